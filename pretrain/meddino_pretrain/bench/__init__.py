"""Benchmarks of the training step and of the loader."""
