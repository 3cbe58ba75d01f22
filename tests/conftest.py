"""Shared fixtures: the real data and the recorded numbers beside the checkout, where they exist."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Two torch processes with full thread pools slow each other many times over; tests run in parallel.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shapes in public signatures are checked in tests, and cost nothing in training.
install_import_hook(["meddino.data", "meddino.layers", "meddino.models", "meddino.losses"], "beartype.beartype")

PROJECT = Path(__file__).resolve().parents[1]
SHARED = PROJECT.parent / "shared"


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/{name}, which is not on this machine")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """../shared/data: real CT volumes and labels."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """../shared/reference: numbers recorded from the published implementation."""
    return _shared("reference")
