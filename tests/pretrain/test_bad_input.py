"""A corpus that is not what it should be ends `meddino-pretrain` with one line and exit code 2, nothing half-written."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from meddino_pretrain.cli import main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.run_folder import open_run

from meddino.core.config import load_config
from meddino.data.corpus import Corpus


@pytest.fixture
def corpus(make_corpus) -> Path:
    return make_corpus(count=8).root


@pytest.fixture
def refused(request, tmp_path, capsys):
    """Return a function that trains on a corpus, sees it refused, and returns the one line."""

    def run(corpus: Path, *overrides: str, out: Path = tmp_path / "run") -> str:
        recipe = str(request.path.with_name("tiny.yaml"))
        assert main([recipe, "--corpus", str(corpus), "--out", str(out), *overrides]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1
        return lines[0]

    return run


def change_info(corpus: Path, **changes) -> None:
    path = corpus / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bad_input__no_corpus(refused, tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is no finished corpus: corpus.json is missing" in refused(tmp_path / "empty")
    assert not (tmp_path / "run").exists()


def test_bad_input__a_corpus_of_another_version(refused, corpus, tmp_path):
    change_info(corpus, schema_version=99)
    assert "schema version 99 found, this program reads version 1" in refused(corpus)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"schema_version": 1'])
def test_bad_input__a_damaged_corpus_json(refused, corpus, content):
    (corpus / "corpus.json").write_text(content)
    assert str(corpus / "corpus.json") in refused(corpus)


def test_bad_input__a_missing_shard(refused, corpus, tmp_path):
    (corpus / "shards" / "tiny-000001.tar").unlink()
    assert "lacks 1 of 2 shards, e.g. shards/tiny-000001.tar" in refused(corpus)
    assert not (tmp_path / "run").exists()


def test_bad_input__a_missing_or_foreign_index(refused, corpus):
    index = corpus / "slices.parquet"
    table = pq.read_table(index)
    index.unlink()
    assert "slices.parquet is missing or damaged" in refused(corpus)
    pq.write_table(table.drop_columns(["crc32", "rows"]), index)
    assert "lacks the columns crc32, rows" in refused(corpus)
    pq.write_table(table.slice(0, 0), index)
    assert "holds no slices" in refused(corpus)
    place = table.schema.get_field_index("shard")
    outside = pa.array(["../../secret.tar"] * len(table))
    pq.write_table(table.set_column(place, table.schema.field("shard"), outside), index)
    assert "leads out of its folder" in refused(corpus)


def test_bad_input__a_corpus_that_changed_under_a_run(request, refused, corpus, make_corpus, tmp_path):
    config = load_config(PretrainConfig, [request.path.with_name("tiny.yaml")])
    with open_run(tmp_path / "run", config, Corpus(corpus)):
        pass
    other = make_corpus(count=9, name="other")
    line = refused(other.root)
    assert Corpus(corpus).content_hash[:12] in line and other.content_hash[:12] in line
    shutil.rmtree(corpus)
    shutil.move(other.root, corpus)  # the same path with other slices in it
    assert refused(corpus) == line.replace(str(other.root), str(corpus))


def test_bad_input__more_damaged_slices_than_allowed(refused, corpus):
    shard = corpus / "shards" / "tiny-000000.tar"  # four of the eight slices
    shard.write_bytes(b"\0" * shard.stat().st_size)
    line = refused(corpus, "loader.max_damaged=2")
    assert "3 damaged slices in corpus" in line and "loader.max_damaged allows 2" in line and "checksum mismatch" in line


def test_bad_input__sizes_that_do_not_divide(refused, corpus):
    line = refused(corpus, "stages.stage1_pretrain.accumulation=3")
    assert "does not divide over 1 processes x 3 micro-batches" in line
    line = refused(corpus, "stages.stage1_pretrain.crops.sizes=[{global_px: 30, local_px: 16}]")
    assert "crops.sizes.0.global_px=30: not a multiple of the patch size 8" in line


def test_bad_input__world_size_that_does_not_divide(refused, corpus, monkeypatch):
    monkeypatch.setattr("meddino_pretrain.build.world_size", lambda: 3)
    line = refused(corpus)
    assert "global batch 4 does not divide over 3 processes x 1 micro-batches" in line and "the nearest: " in line
