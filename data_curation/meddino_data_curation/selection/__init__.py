"""Which volumes and slices are kept."""
