"""The folder of a run: initialization, checkpoints, signals."""
