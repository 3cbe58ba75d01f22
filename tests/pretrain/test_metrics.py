"""metrics.jsonl and what mirrors it."""

import json
import sys
from types import ModuleType

import pytest
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.metrics import MetricsWriter, read_metrics
from meddino_pretrain.stages import run_pretraining

from meddino.core.config import load_config
from meddino.core.errors import CheckpointError, ConfigError

STAGE = "stage1_pretrain"


class FakeWandb(ModuleType):
    """Weights & Biases as far as the trainer uses it: nothing leaves the machine."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0

    def init(self, **options):
        self.runs.append(options)
        return self

    def log(self, numbers, step):
        self.logged.append((step, dict(numbers)))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb__gets_the_numbers_of_every_step(request, wandb, make_corpus_once, tmp_path):
    overrides = [f"stages.{STAGE}.steps=3", "saving.wandb_project=ct", "saving.tensorboard=true"]
    config = load_config(PretrainConfig, [request.path.with_name("tiny.yaml")], overrides)
    run_pretraining(config, make_corpus_once, tmp_path / "run", [STAGE])
    (options,) = wandb.runs
    assert options["project"] == "ct" and options["name"] == f"run-{STAGE}" and options["resume"] == "allow"
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["id"]
    assert len(run_id) == 12 and options["id"] == f"{run_id}-{STAGE}"
    assert [step for step, _ in wandb.logged] == [1, 2, 3] and wandb.finished == 1
    for (_, numbers), record in zip(wandb.logged, read_metrics(tmp_path / "run" / STAGE / "metrics.jsonl"), strict=True):
        assert numbers["loss"] == record["loss"] and numbers["images_per_s"] == record["timing"]["images_per_s"]
        assert all(isinstance(value, int | float) for value in numbers.values())
    assert list((tmp_path / "run" / STAGE / "tensorboard").glob("events.*"))


def test_wandb__not_installed_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"saving\.wandb_project is set .* pip install 'meddino\[wandb\]'"):
        MetricsWriter(tmp_path, 0, tensorboard=False, wandb_project="ct")


def test_metrics__a_resume_cuts_what_came_after_its_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": float("nan") if step == 2 else 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # cut off by a kill
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, None, 1.0]
    MetricsWriter(tmp_path, 2, tensorboard=False).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_metrics__a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2: no JSON object"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("left_by_a_crash", [b"\0" * 64 + b"\n", b"\0" * 64, b'{"step": 3, "lo\0\0\n{"step": 4}\n'])
def test_metrics_writer__what_is_damaged_behind_the_checkpoint_is_cut_away(tmp_path, left_by_a_crash):
    lines = b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(lines + left_by_a_crash)
    MetricsWriter(tmp_path, 2, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    (tmp_path / "metrics.jsonl").write_bytes(b"\0" * 64 + b"\n" + lines)
    with pytest.raises(CheckpointError, match="line 1"):
        MetricsWriter(tmp_path, 2, tensorboard=False)
