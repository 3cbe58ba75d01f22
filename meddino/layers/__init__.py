"""The parts of a vision transformer, one idea a file."""
