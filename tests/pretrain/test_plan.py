"""What a run would take, against docs/scaling.md, and what is refused before it begins."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from meddino_pretrain.cli import main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.plan import GIB, PlannedMachine, named_machine, plan_run, stage_size

from meddino.core.config import load_config
from meddino.core.errors import ConfigError

TINY = Path(__file__).with_name("tiny.yaml")
NAMES = ("stage1_pretrain", "stage2_gram", "stage3_highres")


def recipe(name, *overrides):
    return load_config(PretrainConfig, [name], overrides, kind="pretrain")


@pytest.mark.parametrize(("name", "tflop"), [("ct3m_vitb", (0.61, 1.04, 7.3)), ("ct3m_vitl", (2.1, 3.6, 23))])
def test_stage_size__operations_are_those_of_the_table(name, tflop):
    config = recipe(name)
    found = [stage_size(config, stage).operations() / 1e12 for stage in config.stages]
    assert found == pytest.approx(list(tflop), rel=0.1)


@pytest.mark.parametrize(("machine", "hours"), [("1x2xa100", 82), ("1x8xh100", 8)])
def test_plan__hours_are_those_of_the_table(machine, hours):
    plans = plan_run(recipe("ct3m_vitb", *(f"stages.{name}.accumulation=16" for name in NAMES)), named_machine(machine))
    assert sum(each.hours for each in plans) == pytest.approx(hours, rel=0.08)


def test_plan__slices_and_memory_of_two_cards():
    first, second, third = plan_run(recipe("ct3m_vitb"), named_machine("1x2xa100"))
    assert (first.slices, first.micro_batch, third.micro_batch) == (256, 128, 16)
    # Beside the recipe: 49, 54 and 56 GB; the process itself is in ours.
    assert [each.memory_bytes / 1e9 for each in (first, second, third)] == pytest.approx([50, 55, 56], rel=0.04)
    assert first.disk_bytes / 1e9 == pytest.approx(13 * 2.1 + 10 * 0.34, rel=0.1)


def test_plan__a_recipe_that_cannot_fit_says_what_would():
    machine = named_machine("1x1xrtx4090")
    with pytest.raises(
        ConfigError, match=r"stage1_pretrain takes about .* it fits with stages.stage1_pretrain.accumulation=16$"
    ):
        plan_run(recipe("ct3m_vitb"), machine)
    plan_run(recipe("ct3m_vitb", "stages.stage1_pretrain.accumulation=16"), machine, ["stage1_pretrain"])


def test_plan__where_only_recomputing_helps_it_says_so():
    machine = PlannedMachine(1, 5.2 * GIB, None, True, "a small card")
    with pytest.raises(ConfigError, match=r"machine\.activation_checkpointing=true stages\.stage3_highres\.accumulation=\d+$"):
        plan_run(recipe("ct3m_vitb"), machine, ["stage3_highres"])
    with pytest.raises(ConfigError, match="no accumulation makes it fit"):
        plan_run(recipe("ct3m_vitb"), PlannedMachine(1, 2 * GIB, None, True, "a smaller card"), ["stage1_pretrain"])


def test_plan__a_batch_that_does_not_divide():
    with pytest.raises(ConfigError, match="stage1_pretrain: global batch 512 does not divide over 3 processes x 2"):
        plan_run(recipe("ct3m_vitb"), named_machine("1x3"))


@pytest.mark.parametrize("text", ["8", "0x8", "axb", "4x8xb400"])
def test_named_machine__refuses_what_it_does_not_know(text):
    with pytest.raises(ConfigError, match=f"--machine {text}: give NODESxPROCESSES.*h100"):
        named_machine(text)


def test_plan_command__prints_and_writes_nothing(make_corpus_once, tmp_path, capsys):
    words = [str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run")]
    assert main([*words, "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "plan for 1 process on" in shown and all(name in shown for name in NAMES)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--corpus", "nowhere"], "nowhere"),
        (["--corpus", "nowhere", "--corpus-comes", "init.weights=w.pth"], "w.pth"),
        (["--corpus", "nowhere", "--stage", "stage9"], "no stage 'stage9' in this recipe"),
        (["--corpus", "nowhere", "--machine", "1x7"], "does not divide"),
    ],
)
def test_plan_command__wrong_input_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(TINY), "--out", "run", "--plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_plan_command__a_corpus_that_comes_is_not_asked_for(tmp_path, capsys):
    assert main([str(TINY), "--corpus", str(tmp_path / "c"), "--out", str(tmp_path / "r"), "--plan", "--corpus-comes"]) == 0
    assert "not there yet" in capsys.readouterr().out


def test_plan_command__a_full_disk_is_refused_after_the_plan_or_told(make_corpus_once, tmp_path, monkeypatch, capsys):
    words = [str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run"), "--plan"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(words) == 2
    refused = capsys.readouterr()
    assert "no room for the run's checkpoints" in refused.err and all(name in refused.out for name in NAMES)
    assert main([*words, "--warn-disk"]) == 0
    assert "disk: no room for the run's checkpoints" in capsys.readouterr().out


def test_plan_command__what_a_run_wrote_before_needs_no_room_again(make_corpus_once, tmp_path, monkeypatch):
    words = [str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run"), "--plan"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "model.safetensors").open("wb") as file:
        file.truncate(2**34)
    assert main(words) == 0


def test_plan_command__crops_that_the_backbone_cannot_take(make_corpus_once, tmp_path, capsys):
    words = [str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run"), "--plan"]
    assert main([*words, "backbone.changes.patch_size=7"]) == 2
    assert "not a multiple of the backbone's patch size 7" in capsys.readouterr().err


def test_plan_command__says_which_snapshots_a_short_stage_does_not_keep(make_corpus_once, tmp_path, capsys):
    words = [str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run"), "--plan"]
    assert main([*words, "stages.stage1_pretrain.snapshot_steps=[2,99]"]) == 0
    assert "snapshots: stage1_pretrain keeps none after [99], which lie beyond its 6 steps" in capsys.readouterr().out


def test_plan_command__with_another_run_to_branch_from(make_corpus_once, tmp_path, capsys):
    words = [str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run"), "--plan", "--branch-from", "nowhere"]
    assert main(words) == 2
    assert "neither a run's folder nor a checkpoint's" in capsys.readouterr().err
    assert main([*words, "--corpus-comes"]) == 0  # the jobs before may be what makes it


def test_plan_command__refuses_a_corpus_that_the_run_refuses(make_corpus_once, tmp_path, capsys):
    words = [str(TINY), "--corpus", str(make_corpus_once), "--out", str(tmp_path / "run"), "--plan"]
    assert main([*words, "input_contract={modality: mr}"]) == 2
    assert "the corpus holds slices of modality 'ct', the recipe has contracts for mr" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    assert main([*words, f"monitoring.probe_data={tmp_path / 'data'}"]) == 2
    assert "has no audit called 'data'" in capsys.readouterr().err


def test_plan_command__refuses_slices_without_a_range_of_values(make_corpus_once, tmp_path, capsys):
    corpus = shutil.copytree(make_corpus_once, tmp_path / "corpus")
    slices = pq.read_table(corpus / "slices.parquet")
    place = slices.schema.get_field_index("modality")
    field = slices.schema.field(place)
    pq.write_table(slices.set_column(place, field, pa.array(["mr"] * len(slices), field.type)), corpus / "slices.parquet")
    words = [str(TINY), "--corpus", str(corpus), "--out", str(tmp_path / "run"), "--plan", "input_contract={modality: mr}"]
    assert main(words) == 2
    assert "have no value_low and value_high" in capsys.readouterr().err
