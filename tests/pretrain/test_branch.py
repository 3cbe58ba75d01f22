"""A new run from a checkpoint of another: what a run left alone would have done, and what may be changed on purpose."""

import json
import shutil
from pathlib import Path

import pytest
from meddino_pretrain.cli import main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.metrics import TIMING, read_metrics
from meddino_pretrain.run.branch import branch_run, check_recipe, find_branch
from meddino_pretrain.run.folder import PROBE_REFERENCE
from meddino_pretrain.stages import run_pretraining

from meddino.checkpoints.state.verify import Checkpoint
from meddino.core.config import load_config
from meddino.core.errors import ConfigError

TINY = Path(__file__).with_name("tiny.yaml")
STAGE = "stage1_pretrain"


def trace(run: Path) -> list[dict]:
    records = read_metrics(run / STAGE / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != TIMING} for record in records]


@pytest.fixture(scope="module")
def original(tmp_path_factory, make_corpus_once):
    run = tmp_path_factory.mktemp("original") / "run"
    run_pretraining(load_config(PretrainConfig, [TINY]), make_corpus_once, run, [STAGE])
    return run


@pytest.fixture
def branch(original, make_corpus_once, tmp_path):
    """Branch from a checkpoint of the original, or from its newest, and train on; returns the exit code."""

    def run(*words: str, step: int | None = None, start: Path | None = None) -> int:
        source = start or (original if step is None else original / STAGE / "checkpoints" / f"step-{step:09d}")
        given = [str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "new"), "--stage", STAGE]
        return main([*given, "--branch-from", str(source), *words])

    return run


def test_branch__the_same_recipe_from_a_checkpoint_is_the_same_run(branch, original, tmp_path):
    assert branch(step=4) == 0
    assert trace(tmp_path / "new") == trace(original)
    last = f"{STAGE}/checkpoints/step-000000006/rank-00000.safetensors"
    assert (tmp_path / "new" / last).read_bytes() == (original / last).read_bytes()
    info, before = (json.loads((run / "run.json").read_text()) for run in (tmp_path / "new", original))
    assert info["branched_from"] == {"run": "run", "id": before["id"], "stage": STAGE, "step": 4}
    assert info["id"] != before["id"] and info["changes"] == []


def test_branch__a_finished_stage_is_extended_at_a_lower_rate(branch, original, tmp_path):
    change = (f"stages.{STAGE}.steps=8", f"stages.{STAGE}.schedule.lr=0.0001")
    before = (original / "run.json").read_bytes()
    assert branch(*change) == 0
    records = trace(tmp_path / "new")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert records[:6] == trace(original)
    assert records[7]["lr"] == pytest.approx(0.0001)
    assert (original / "run.json").read_bytes() == before
    assert json.loads((tmp_path / "new" / "run.json").read_text())["stages"][STAGE]["steps"] == 8  # the report's "of"
    assert branch(*change) == 0  # the same command again finds it done


@pytest.mark.parametrize(
    ("words", "start", "said"),
    [
        (["stages.stage1_pretrain.steps=6"], None, "the checkpoint stands after step 6: give more"),
        ([], Path("nowhere"), "neither a run's folder nor a checkpoint's"),
    ],
)
def test_branch__wrong_input_is_one_line_and_leaves_nothing(branch, tmp_path, capsys, words, start, said):
    assert branch(*words, start=start) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_branch__the_folder_of_something_else_is_left_alone(branch, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    assert branch(f"stages.{STAGE}.steps=8") == 2
    assert "choose another --out" in capsys.readouterr().err
    assert (tmp_path / "new" / "mine.txt").read_text() == "mine"


def longer(*overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, [TINY], [f"stages.{STAGE}.steps=8", *overrides])


def checkpoint(run: Path, step: int) -> Path:
    return run / STAGE / "checkpoints" / f"step-{step:09d}"


def edit_info(run: Path, change) -> None:
    info = json.loads((run / "run.json").read_text())
    change(info)
    (run / "run.json").write_text(json.dumps(info))


def test_branch__a_run_of_the_same_name_is_another_run(original, tmp_path):
    other = tmp_path / "elsewhere" / original.name
    shutil.copytree(original, other)
    edit_info(other, lambda info: info.update(id="0" * 12))
    branch_run(checkpoint(original, 4), tmp_path / "new", longer())
    assert find_branch(checkpoint(original, 4), tmp_path / "new", longer()) is None
    for source in (checkpoint(other, 4), other, checkpoint(original, 6)):
        with pytest.raises(ConfigError, match="was not branched from"):
            find_branch(source, tmp_path / "new", longer())


def test_branch__one_that_knows_no_id_goes_on_by_name_stage_and_step(original, tmp_path):
    branch_run(original, tmp_path / "new", longer())
    edit_info(tmp_path / "new", lambda info: info["branched_from"].pop("id"))
    assert find_branch(original, tmp_path / "new", longer()) is None
    with pytest.raises(ConfigError, match="was not branched from"):
        find_branch(checkpoint(original, 4), tmp_path / "new", longer())


def test_branch__the_same_command_goes_on_after_the_run_has_moved_on(original, tmp_path):
    run, aside = tmp_path / "run", tmp_path / "aside"
    shutil.copytree(original, run)
    checkpoint(run, 6).rename(aside)
    branch_run(run, tmp_path / "new", longer())
    branch_run(checkpoint(run, 4), tmp_path / "newer", longer())
    aside.rename(checkpoint(run, 6))
    shutil.rmtree(checkpoint(run, 4))  # as a run does that keeps its newest alone
    assert json.loads((tmp_path / "new" / "run.json").read_text())["branched_from"]["step"] == 4
    assert find_branch(run, tmp_path / "new", longer()) is None
    assert find_branch(checkpoint(run, 4), tmp_path / "newer", longer()) is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("input_contract.modality=mr", "input_contract.modality: ct -> mr"),
        ("other_contracts=[{modality: mr}]", r"other_contracts: \[\] -> \[.*mr"),
        ("backbone.changes.drop_path=0.1", r"backbone\.changes\.drop_path: 0\.25 -> 0\.1"),
        ("init.weights=other.pth", r"init\.weights: scratch -> other\.pth"),
    ],
)
def test_branch__what_the_weights_are_may_not_be_another(original, tmp_path, override, said):
    with pytest.raises(ConfigError, match=rf"was learnt with another recipe \(then -> now\): .*{said}"):
        branch_run(original, tmp_path / "new", longer(override))
    assert not list(tmp_path.iterdir())


def test_branch__what_is_another_from_there_on_is_written_down(original, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(original, run)
    (run / PROBE_REFERENCE).write_bytes(b"")
    before = {"after": {"stage": STAGE, "step": 2}, "keys": ["loader.prefetch: 2 -> 4"]}
    edit_info(run, lambda info: info.update(changes=[before, {**before, "after": {"stage": STAGE, "step": 6}}]))
    branch_run(checkpoint(run, 4), tmp_path / "new", longer("seed=3", "optimizer.layerwise_decay=1.0"))
    *kept, change = json.loads((tmp_path / "new" / "run.json").read_text())["changes"]
    assert kept == [before]
    assert change["after"] == {"stage": STAGE, "step": 4}
    assert change["keys"] == ["seed: 0 -> 3", "optimizer.layerwise_decay: 0.9 -> 1.0", f"stages.{STAGE}.steps: 6 -> 8"]
    assert (tmp_path / "new" / PROBE_REFERENCE).exists()
    branch_run(checkpoint(run, 4), tmp_path / "newer", longer("probe.slices=4"))
    assert not (tmp_path / "newer" / PROBE_REFERENCE).exists()  # of other slices than the run will measure


@pytest.mark.parametrize("step", ["2", "auto"])
def test_branch__a_gram_teacher_from_before_that_was_not_kept_is_refused_at_once(
    original, make_corpus_once, tmp_path, capsys, step
):
    given = [f"stages.{name}.method.gram_teacher.step={step}" for name in ("stage2_gram", "stage3_highres")]
    words = [str(TINY), *given, f"stages.{STAGE}.steps=8", f"stages.{STAGE}.snapshot_steps=[2]", "--branch-from", str(original)]
    for plan in ([], ["--plan"]):
        assert main([*words, "--corpus", str(make_corpus_once), "--out", str(tmp_path / "new"), *plan]) == 2
        said = capsys.readouterr().err
        assert (
            "stages.stage2_gram.method needs the backbone of stage1_pretrain after step 2, from before the checkpoint" in said
        )
        assert "has kept it after 3: ask for what is there" in said
    assert not list(tmp_path.iterdir())
    later = [f"stages.{name}.method.gram_teacher.step=7" for name in ("stage2_gram", "stage3_highres")]
    assert find_branch(original, tmp_path / "new", longer(*later)) is not None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("starts_from=null", r"stages\.stage2_gram\.starts_from: stage1_pretrain -> None"),
        (
            "method.gram_teacher.step=2",
            "which is in the checkpoint: stage1_pretrain after step 3 -> stage1_pretrain after step 2",
        ),
    ],
)
def test_branch__what_a_begun_stage_began_with_may_not_be_another(override, said):
    old = load_config(PretrainConfig, [TINY])
    new = load_config(PretrainConfig, [TINY], [f"stages.stage2_gram.{override}"])
    with pytest.raises(ConfigError, match=said):
        check_recipe(new, old, "stage2_gram", Checkpoint(Path("step-000000002"), {"step": 2}))
    longer_lr = load_config(PretrainConfig, [TINY], ["stages.stage2_gram.steps=9", "stages.stage3_highres.schedule.lr=0.0001"])
    earlier, changes = check_recipe(longer_lr, old, "stage2_gram", Checkpoint(Path("step-000000002"), {"step": 2}))
    assert earlier == [STAGE] and len(changes) == 2
