"""A tiny corpus, written from the contract alone: what `meddino-curate build` would leave behind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from meddino.data.corpus import Corpus
from tests.data.tiny_corpus import write_corpus


def disc_slice(number: int, rows: int, cols: int) -> np.ndarray:
    """A body (40 HU) with two lungs, a spine and a texture of its own in air."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : cols * 1j]
    hu = np.full((rows, cols), -1000.0)
    hu[(y / 0.8) ** 2 + (x / 0.9) ** 2 < 1] = 40
    for side in (-0.4, 0.4):
        hu[((y + 0.1) / 0.4) ** 2 + ((x - side) / (0.2 + 0.1 * rng.random())) ** 2 < 1] = -800
    hu[(y - 0.5) ** 2 + x**2 < 0.02] = 600
    return (hu + rng.normal(0, 15, hu.shape)).astype(np.int16)


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """Return a function that writes a corpus of `count` slices of a size and opens it."""

    def make(
        count: int = 24, rows: int = 96, cols: int = 80, spacing_mm: tuple[float, float] = (0.8, 0.8), name: str = "corpus"
    ) -> Corpus:
        slices = [disc_slice(i, rows, cols) for i in range(count)]
        return Corpus(write_corpus(tmp_path / name, slices, spacing_mm))

    return make


@pytest.fixture(scope="session")
def make_corpus_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one corpus of 24 slices, for tests that only read it."""
    return write_corpus(tmp_path_factory.mktemp("tiny") / "corpus", [disc_slice(i, 96, 80) for i in range(24)])


@pytest.fixture
def write_slices() -> Callable[..., Path]:
    """A function that writes given slices as a corpus: `write_slices(folder, slices)`."""
    return write_corpus
