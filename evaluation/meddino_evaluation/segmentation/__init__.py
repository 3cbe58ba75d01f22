"""Segmentation: train a head (and the encoder, if asked) on labelled slices, predict whole volumes, measure per case."""
