"""What is in a corpus, told by hashes."""

import numpy as np

from meddino.data.content import slice_hash
from meddino.data.corpus import Corpus
from meddino.data.overlap import slice_hashes, volume_hashes
from tests.data.tiny_corpus import write_corpus


def test_slice_hashes__of_every_schema_are_those_of_the_slices(tmp_path):
    slices = [np.random.default_rng(seed).integers(-1000, 1000, (20, 30)).astype(np.int16) for seed in range(12)]
    expected = {slice_hash(values) for values in slices}
    assert len(expected) == 12
    for schema in (1, 2):
        assert slice_hashes(Corpus(write_corpus(tmp_path / str(schema), slices, schema=schema))) == expected


def test_slice_hash__tells_shape_and_type_apart():
    values = np.zeros((4, 6), np.int16)
    others = (values.reshape(6, 4), values.astype(np.uint16), values.reshape(2, 4, 3))
    assert len({slice_hash(one) for one in (values, *others)}) == 4


def test_volume_hashes__leave_out_what_was_refused_or_erased(tmp_path):
    slices = [np.full((20, 30), number, np.int16) for number in range(16)]
    status = ("accepted", "duplicate", "rejected", "erased")
    volumes = [{"status": name, "content_hash": name} for name in status]
    assert volume_hashes(Corpus(write_corpus(tmp_path / "corpus", slices, volumes=volumes))) == {"accepted", "duplicate"}
