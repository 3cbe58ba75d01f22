"""MedDINO: domain-adaptive self-supervised pretraining of vision transformers on CT."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("meddino")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
