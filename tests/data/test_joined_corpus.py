import numpy as np
import pytest

from meddino.core.errors import ShardError
from meddino.data.corpus import Corpus
from meddino.data.joined_corpus import open_corpora
from tests.data.tiny_corpus import write_corpus


def slices(count: int, first: int) -> list[np.ndarray]:
    return [np.full((32, 40), number, dtype=np.int16) for number in range(first, first + count)]


def audit(name: str, overlaps: int) -> dict:
    return {"name": name, "overlaps": overlaps, "volumes": 3, "unread": 0, "compared": {"patient": 3}}


@pytest.fixture
def folders(tmp_path):
    write_corpus(tmp_path / "a", slices(8, 0), audit=[audit("x", 0), audit("y", 1)])
    write_corpus(tmp_path / "b", slices(12, 100), (1.0, 2.0), audit=[audit("x", 2)])
    return tmp_path / "a", tmp_path / "b"


def test_joined__reads_the_slices_of_one_after_those_of_the_other(folders):
    joined, first, second = open_corpora(folders), Corpus(folders[0]), Corpus(folders[1])
    assert len(joined) == 20
    for index in range(20):
        part, own = (first, index) if index < 8 else (second, index - 8)
        np.testing.assert_array_equal(joined.read(index), part.read(own))
        assert joined.key(index) == f"{part.location}/{part.key(own)}"
        assert joined.modality(index) == part.modality(own)
        assert joined.spacing_mm[index].tolist() == part.spacing_mm[own].tolist()
    assert joined.volumes.num_rows == first.volumes.num_rows + second.volumes.num_rows


def test_joined__is_named_by_what_it_holds_in_this_order(folders):
    a, b = folders
    hashes = {open_corpora(order).content_hash for order in ([a, b], [b, a], [a], [b])}
    assert len(hashes) == 4
    assert open_corpora([a]).content_hash == Corpus(a).content_hash


def test_joined__an_audit_that_only_one_underwent_says_so(folders):
    entries = {entry["name"]: entry["overlaps"] for entry in open_corpora(folders).info["audit"]}
    assert entries == {"x": 2, f"y, only {folders[0]}": 1}


def test_joined__one_corpus_twice_is_refused(folders):
    with pytest.raises(ShardError, match=r"given twice.*weight"):
        open_corpora([folders[0], folders[1], folders[0]])


def test_joined__volumes_in_both_are_told(tmp_path, caplog):
    for name in ("a", "b"):
        write_corpus(tmp_path / name, slices(8, 0), volumes=[{"content_hash": "1" * 64}, {"content_hash": f"{name}" * 64}])
    open_corpora([tmp_path / "a", tmp_path / "b"])
    assert "1 volumes are in more than one of the corpora" in caplog.text
