"""Starts the other commands on SLURM: `meddino-submit`."""
