"""What weights of 0 leave out of training is in no lineage, in no list of training volumes, and told."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from meddino_pretrain.cli import main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.run.branch import branch_run
from meddino_pretrain.run.config import SamplingConfig
from meddino_pretrain.run.corpus_audit import weight_warnings
from meddino_pretrain.run.folder import open_run
from meddino_pretrain.run.trained_volumes import trained_volumes

from meddino.checkpoints.export.lineage import corpus_lineage, training_volumes, write_volume_list
from meddino.checkpoints.state.names import list_checkpoints
from meddino.core.config import load_config
from meddino.data.corpus import Corpus
from meddino.data.joined_corpus import open_corpora
from meddino.data.overlap import VOLUMES_FILE
from tests.data.tiny_corpus import write_corpus
from tests.pretrain.conftest import disc_slice

TINY = Path(__file__).with_name("tiny.yaml")
STAGE = "stage1_pretrain"
ONE_STEP = (
    f"stages.{STAGE}.steps=1",
    "stages.stage2_gram.method.gram_teacher.step=1",
    "stages.stage3_highres.method.gram_teacher.step=1",
)


def hash_of(number: int) -> str:
    return f"{number:016x}" + "0" * 16


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Two volumes of amos, two of kits, and a duplicate of each that is of the other set."""
    volumes = [
        {"dataset": name, "content_hash": hash_of(number)} for number, name in enumerate(("amos", "amos", "kits", "kits"))
    ]
    twins = [
        {"dataset": "kits", "content_hash": hash_of(4), "status": "duplicate", "duplicate_of": "v000"},
        {"dataset": "amos", "content_hash": hash_of(5), "status": "duplicate", "duplicate_of": "v002"},
    ]
    return write_corpus(tmp_path / "corpus", [disc_slice(i, 96, 80) for i in range(24)], volumes=[*volumes, *twins])


def recipe(*overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, [TINY], [*ONE_STEP, *overrides])


def listed(folder: Path) -> set[int]:
    return {int(key, 16) for key in (folder / VOLUMES_FILE).read_text().split()}


@pytest.fixture
def six_volumes(corpus):
    """The corpus without the slices of its two duplicates: they have none in a real one."""
    opened = Corpus(corpus)
    opened.slices = opened.slices.slice(0, 16)
    return opened


def test_trained_volumes__a_duplicate_goes_with_the_copy_that_is_seen(six_volumes):
    found = trained_volumes(six_volumes, SamplingConfig(dataset={"kits": 0.0}))
    assert found.column("volume_id").to_pylist() == ["v000", "v001", "v004"]
    assert trained_volumes(six_volumes, SamplingConfig(dataset={"kits": 0.5})) is six_volumes.volumes
    again = trained_volumes(six_volumes, SamplingConfig(dataset={"kits": 0.0}), {hash_of(3)[:16]})
    assert again.column("volume_id").to_pylist() == ["v000", "v001", "v003", "v004"]


def test_trained_volumes__of_several_corpora_that_use_the_same_ids(tmp_path):
    for name in ("a", "b"):
        write_corpus(tmp_path / name, [disc_slice(i, 24, 20) for i in range(8)])
    found = trained_volumes(open_corpora([tmp_path / "a", tmp_path / "b"]), SamplingConfig(corpus={"a": 0.0}))
    assert found.num_rows == 2 and found.column("volume_id").to_pylist() == ["v000", "v001"]


def test_run__what_never_comes_is_in_neither_list_nor_checkpoint(corpus, tmp_path):
    words = [str(TINY), "--corpus", str(corpus), "--out", str(tmp_path / "run"), "--stage", STAGE, *ONE_STEP]
    assert main([*words, "corpus.sampling.dataset.kits=0"]) == 0
    (checkpoint,) = list_checkpoints(tmp_path / "run" / STAGE / "checkpoints")
    lineage = json.loads((checkpoint / "meta.json").read_text())["lineage"]
    assert [record["dataset"] for record in lineage["data"]] == ["amos"] and lineage["data"][0]["volumes"] == 2
    assert 0 in listed(tmp_path / "run") and not {2, 3} & listed(tmp_path / "run")
    assert len(training_volumes(checkpoint) or ()) == lineage["training_volumes"]["volumes"]


def test_run__begun_before_goes_on_with_its_list(corpus, tmp_path):
    opened, config = Corpus(corpus), recipe("corpus.sampling.dataset.kits=0")
    with open_run(tmp_path / "run", config, opened):
        pass
    (tmp_path / "run" / STAGE).mkdir()
    (tmp_path / "run" / STAGE / "metrics.jsonl").write_text('{"step": 1}\n')
    write_volume_list(tmp_path / "run", opened.volumes)
    before = (tmp_path / "run" / VOLUMES_FILE).read_bytes()
    with open_run(tmp_path / "run", config, opened) as run:
        assert run.corpus_lineage == corpus_lineage(opened)
    assert (tmp_path / "run" / VOLUMES_FILE).read_bytes() == before


def test_branch__other_weights_add_to_what_was_learnt_from_and_old_checkpoints_keep_their_list(corpus, tmp_path):
    words = [str(TINY), "--corpus", str(corpus), "--out", str(tmp_path / "run"), "--stage", STAGE, *ONE_STEP]
    assert main([*words, "corpus.sampling.dataset.kits=0"]) == 0
    config = recipe("corpus.sampling.dataset.amos=0", f"stages.{STAGE}.steps=2")
    branch_run(tmp_path / "run", tmp_path / "new", config)
    with open_run(tmp_path / "new", config, Corpus(corpus)) as run:
        assert [record["dataset"] for record in run.corpus_lineage["data"]] == ["amos", "kits"]
    assert listed(tmp_path / "new") >= {0, 1, 2, 3} > listed(tmp_path / "run") & {0, 1, 2, 3}
    (checkpoint,) = list_checkpoints(tmp_path / "new" / STAGE / "checkpoints")
    assert {int(key, 16) for key in training_volumes(checkpoint) or ()} == listed(tmp_path / "run")


def test_warnings__say_what_is_left_out_and_that_the_export_would_be_for_it(six_volumes):
    place = six_volumes.slices.schema.get_field_index("modality")
    six_volumes.slices = six_volumes.slices.set_column(place, "modality", pa.array(["mr"] * 4 + ["ct"] * 12))
    assert weight_warnings(six_volumes, recipe()) == []
    (line,) = weight_warnings(six_volumes, recipe("corpus.sampling.modality.mr=0"))
    assert line == "4 of 16 slices are left out by corpus.sampling (weight 0: modality.mr)"
    out, unseen = weight_warnings(six_volumes, recipe("corpus.sampling.modality.ct=0", "corpus.sampling.dataset.kits=2"))
    assert out.startswith("12 of 16 slices") and "input_contract.modality is ct, and no slice" in unseen


def test_pretrain__run_and_plan_say_what_is_left_out(corpus, tmp_path, capsys):
    words = [str(TINY), "--corpus", str(corpus), "--out", str(tmp_path / "run"), "corpus.sampling.dataset.kits=0", "--plan"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "corpus: 12 slices, each is seen" in said.out
    assert "corpus: 12 of 24 slices are left out by corpus.sampling (weight 0: dataset.kits)" in said.out
    assert "12 of 24 slices are left out" in said.err
