"""Volumes in, corpus out: `meddino-curate`."""
