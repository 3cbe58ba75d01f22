"""What lies under the sources, and which sets there are."""
