"""Errors that are the user's to mend. A command prints their one message and exits 2; anything else is a fault of ours."""


class MedDINOError(Exception):
    """Something the user can mend. The message says what, where, the value found and what is allowed."""


class ConfigError(MedDINOError):
    """A config file or a `key=value` override is wrong."""


class VolumeError(MedDINOError):
    """A file is no readable CT volume, or not one that can be used as it is."""


class ShardError(MedDINOError):
    """A corpus, a shard or a sample in it is missing, damaged or of another version."""


class CheckpointError(MedDINOError):
    """Weights or a training checkpoint cannot be used: damaged, of another model, or of another run."""


class StoppedEarly(Exception):
    """The work stopped at a safe point before its end and wants to be run again (exit code 75, `EX_TEMPFAIL`)."""
