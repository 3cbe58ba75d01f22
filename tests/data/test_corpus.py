"""Corpora of every schema are read as today's."""

import json

import numpy as np
import pyarrow as pa
import pytest

from meddino.core.errors import ShardError
from meddino.data.corpus import Corpus
from tests.data.tiny_corpus import write_corpus


@pytest.fixture(scope="module")
def slices() -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(-1000, 1000, (20, 30)).astype(np.int16) for seed in range(12)]


@pytest.mark.parametrize("schema", [1, 2])
def test_corpus__of_either_schema_gives_the_same_slices_and_columns(slices, tmp_path, schema):
    corpus = Corpus(write_corpus(tmp_path / "corpus", slices, (0.7, 0.8), schema))
    assert all(np.array_equal(corpus.read(index), slices[index]) for index in range(12))
    assert corpus.spacing_mm.tolist() == [[0.7, 0.8]] * 12
    assert (corpus.modality(3), corpus.value_range(3)) == ("ct", None)
    (row,) = corpus.slices.slice(3, 1).to_pylist()
    assert (row["intensity_p50"], row["dtype"], row["channels"]) == (int(np.percentile(slices[3], 50)), "int16", 1)
    assert corpus.volumes.column("modality").to_pylist() == ["ct"] * 3


def test_corpus__a_slice_without_spacing_has_square_pixels(slices, tmp_path):
    root = write_corpus(tmp_path / "corpus", slices)
    corpus = Corpus(root)
    column = corpus.slices.column("spacing_mm").to_pylist()
    column[2] = None
    field = corpus.slices.schema.field("spacing_mm")
    place = corpus.slices.column_names.index("spacing_mm")
    corpus.slices = corpus.slices.set_column(place, field, pa.chunked_array([pa.array(column, field.type)]))
    assert corpus.spacing_mm[1:4].tolist() == [[0.8, 0.8], [1.0, 1.0], [0.8, 0.8]]


@pytest.mark.parametrize("version", [0, 3, "2", None])
def test_corpus__of_another_schema_is_refused(slices, tmp_path, version):
    root = write_corpus(tmp_path / "corpus", slices)
    info = json.loads((root / "corpus.json").read_text())
    (root / "corpus.json").write_text(json.dumps({**info, "schema_version": version}))
    with pytest.raises(ShardError, match=rf"version {version} .*1, 2"):
        Corpus(root)
