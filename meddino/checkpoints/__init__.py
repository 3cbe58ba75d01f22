"""Training state on disk, weights from elsewhere, and exports for others."""
