"""Whole volumes through a trained network."""
