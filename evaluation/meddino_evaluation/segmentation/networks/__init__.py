"""Encoders, heads and whole networks that segment."""
