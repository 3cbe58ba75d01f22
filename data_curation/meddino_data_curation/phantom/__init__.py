"""The embedded default cohort: procedural CT patients with masks, deterministic by seed."""
