"""Shared fixtures: the real data and the recorded numbers beside the checkout, where they exist."""

import gc
import os
import signal
import socket
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import Started
from tests.type_checks import check_types

# Two torch processes with full thread pools slow each other many times over; tests run in parallel.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shapes and types of every signature are checked in tests, and cost nothing in training.
check_types("meddino", "meddino_pretrain", "meddino_data_curation", "meddino_evaluation", "meddino_slurm")

PROJECT = Path(__file__).resolve().parents[1]
SHARED = PROJECT.parent / "shared"


def pytest_configure() -> None:
    """Hear the signals that `nohup` and a shell's `&` ignore: programs inherit that, and tests send them."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep what all test modules hold out of the garbage collector's sight: to walk through it takes a second each time."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def run_ranks() -> Callable[..., list[str]]:
    """A function that runs code in `count` processes that talk over gloo, and returns what each printed."""

    def run(code: str, count: int = 2, timeout_s: float = 120) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        processes = [
            Started(
                [sys.executable, "-c", textwrap.dedent(code)],
                env={**shared, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]
        results = [process.communicate(timeout=timeout_s) for process in processes]
        assert all(process.returncode == 0 for process in processes), "\n".join(errors for _, errors in results)
        return [output for output, _ in results]

    return run
