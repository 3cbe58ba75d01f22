"""Exports: written, proven equal to their source, and loaded again."""
