"""Exported checkpoints in, measured results out: `meddino-eval`."""
