"""Many backbones, protocols and data sets as one job list."""
