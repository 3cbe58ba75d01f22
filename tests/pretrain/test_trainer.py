"""The trainer from finished parts: what a bad step changes, what is saved, and what ends a run."""

import math
from pathlib import Path

import pytest
import torch
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.data.corrupt_samples import CorruptSamples
from meddino_pretrain.data.workers import WorkersLost
from meddino_pretrain.methods.base import Method
from meddino_pretrain.monitoring.metrics import MetricsWriter
from meddino_pretrain.monitoring.monitor import Monitor
from meddino_pretrain.monitoring.progress import StepProgress
from meddino_pretrain.monitoring.speed import SpeedMeter
from meddino_pretrain.optimizer import build_optimizer, parameter_rules
from meddino_pretrain.run.checkpoints import StageCheckpoints, last_checkpoint
from meddino_pretrain.run.config import SavingConfig
from meddino_pretrain.run.guard import RunGuard
from meddino_pretrain.run.signals import StopRequest
from meddino_pretrain.schedules import ScheduleConfig, Schedules
from meddino_pretrain.stages import run_pretraining
from meddino_pretrain.trainer import Trainer
from torch import nn

from meddino.checkpoints.state.flat_state import OptimizerState
from meddino.checkpoints.state.safetensors_storage import read_tensors
from meddino.core.config import load_config
from meddino.core.device import find_machine
from meddino.core.errors import MedDINOError, ShardError, StoppedEarly

MACHINE = find_machine("cpu")


class Square(nn.Module):
    """Learns the mean of what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(1, 1)

    def forward(self, batch, target):
        error = (self.part(torch.ones(1)) - batch.views["x"]).square().mean()
        return {"error": error.detach(), "total": error}


class Squares(Method):
    def __init__(self) -> None:
        self.model = self.called = Square()
        self.machine, self.moved = MACHINE, 0

    def networks(self):
        return {"model": self.model}

    def scheduled(self, step):
        return {"momentum": step / 10}

    def after_step(self, values):
        self.moved += 1

    views = build = export = None


Squares.__abstractmethods__ = frozenset()


class Noted(MetricsWriter, Monitor, StopRequest):
    """Stands where records go, where features are watched and where signals come in, and notes what it is told."""

    def __init__(self, stop_after: int = 0) -> None:
        self.records, self.ended, self.asked, self.stop_after = [], [], 0, stop_after

    def write(self, record):
        self.records.append(record)

    def came(self):
        self.asked += 1
        return self.asked == self.stop_after

    def end(self, finished):
        self.ended.append(finished)

    def measure(self, step):
        return {"features/seen": 1.0} if step == 2 else {}

    def take_seconds(self):
        return 0.25

    def sync(self):
        pass

    def after_record(self, step, probed):
        assert probed == (step == 2)


def batch(step: int, value: float = 1.0, corrupt: int = 0) -> Batch:
    met = [(f"bad{step}-{number}", "cut off") for number in range(corrupt)]
    return Batch(step, 0, {"x": torch.full((2, 1, 1, 1), value)}, [f"s{step}a", f"s{step}b"], corrupt=met)


@pytest.fixture
def trainer(tmp_path):
    torch.manual_seed(0)

    def make(values, corrupt=0, stop_after=0, allowed=1, max_bad_steps=2, every_steps=1, steps=None) -> Trainer:
        method, noted = Squares(), Noted(stop_after)
        optimizer = build_optimizer(method.trainable(), parameter_rules(method.trainable()))
        met = CorruptSamples("corpus", allowed)
        guard = RunGuard(noted, met, max_bad_steps)
        state = {**method.networks(), "optimizer": OptimizerState("optimizer", optimizer, method.model), "guard": guard}
        length = steps or len(values)
        saving = SavingConfig(every_steps=every_steps, keep_last=9)
        checkpoints = StageCheckpoints(tmp_path, state, method.model, {"stage": "one"}, saving, length, frozenset(), met)
        return Trainer(
            method=method,
            optimizer=optimizer,
            schedules=Schedules(ScheduleConfig(lr=0.1, warmup_steps=0), length),
            steps=[[batch(step, value, corrupt)] for step, value in enumerate(values)],
            checkpoints=checkpoints,
            guard=guard,
            metrics=noted,
            progress=StepProgress("one", 0, length, 2, None),
            monitor=noted,
            speed=SpeedMeter(lambda _: 8.0, 1e12),
            machine=MACHINE,
            clip_grad_norm=3.0,
        )

    return make


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "checkpoints" / f"step-{step:09d}")


def test_fit__records_what_a_step_was(trainer):
    one = trainer([1.0, 1.0, 1.0])
    one.fit()
    first, second, third = one.metrics.records
    assert [record["step"] for record in one.metrics.records] == [1, 2, 3] and third["loss"] < first["loss"] == first["error"]
    assert first["momentum"] == 0 and second["momentum"] == 0.1 and first["lr"] == 0.1 and first["weight_decay"] == 0.04
    assert "features/seen" in second and "features/seen" not in first and first["grad_norm/part"] > 0
    assert first["timing"]["eval_time_s"] == 0.25 and first["timing"]["tflops"] > 0 and first["corrupt_samples"] == 0
    assert one.method.moved == 3 and one.monitor.ended == []


def test_train_step__sums_micro_batches_as_their_mean(trainer):
    one = trainer([0.0])
    weight, bias = (float(parameter.detach()) for parameter in one.method.model.part.parameters())
    record = one.train_step([batch(0, 1.0), batch(0, 3.0)])
    error = weight + bias
    assert record["loss"] == pytest.approx(((error - 1) ** 2 + (error - 3) ** 2) / 2, rel=1e-5)
    gradient = 2 * ((error - 1) + (error - 3)) / 2
    assert record["grad_norm/part"] == pytest.approx(math.sqrt(2) * abs(gradient), rel=1e-5)


def test_fit__a_nan_step_changes_nothing(trainer, tmp_path):
    one = trainer([1.0, math.nan, 1.0])
    one.fit()
    before, after, later = (saved(tmp_path, step) for step in (1, 2, 3))
    assert before.keys() == after.keys() and any(name.startswith("optimizer.") for name in before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not torch.equal(later["model.part.weight"], after["model.part.weight"])
    assert [record["skipped"] for record in one.metrics.records] == [False, True, False] and one.method.moved == 2
    assert one.metrics.records[1]["keys"] == ["s1a", "s1b"]


def test_fit__good_steps_between_bad_ones_start_the_count_again(trainer):
    one = trainer([math.nan, 1.0, math.nan, 1.0])
    one.fit()
    assert [record["skipped"] for record in one.metrics.records] == [True, False, True, False]


def test_fit__too_many_bad_steps_in_a_row_end_the_run_unsaved(trainer, tmp_path):
    one = trainer([1.0, math.nan, math.nan, 1.0])
    with pytest.raises(MedDINOError, match=r"2 steps in a row up to step 3.*max_bad_steps = 2.*last samples: s2a"):
        one.fit()
    assert last_checkpoint(tmp_path).step == 2 and one.monitor.ended == [True] and len(one.metrics.records) == 3


def test_fit__a_resumed_run_counts_bad_steps_on(trainer, tmp_path):
    trainer([1.0, math.nan]).fit()
    again = trainer([math.nan], steps=3)
    again.checkpoints.resume(last_checkpoint(tmp_path))
    again.step = again.checkpoints.step
    with pytest.raises(MedDINOError, match="2 steps in a row up to step 3"):
        again.fit()


def test_fit__too_many_corrupt_samples_end_the_run_saved(trainer, tmp_path):
    one = trainer([1.0, 1.0, 1.0], corrupt=1, every_steps=100)
    with pytest.raises(
        ShardError, match=r"2 corrupt samples of corpus corpus were met, loader\.max_corrupt allows 1: bad0-0, bad1-0"
    ):
        one.fit()
    assert [record["corrupt_samples"] for record in one.metrics.records] == [1, 1] and one.monitor.ended == [True]
    assert last_checkpoint(tmp_path).step == 2 and last_checkpoint(tmp_path).meta["corrupt_samples"] == ["bad0-0", "bad1-0"]


def test_fit__a_signal_ends_it_saved_and_asks_to_be_run_again(trainer, tmp_path):
    one = trainer([1.0, 1.0, 1.0], stop_after=2, every_steps=100)
    with pytest.raises(StoppedEarly, match="after step 2"):
        one.fit()
    assert last_checkpoint(tmp_path).step == 2 and one.monitor.ended == [False]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_fit__lost_workers_lose_no_step(trainer, tmp_path, taken):
    one = trainer([1.0, 1.0, 1.0], every_steps=2)

    def some():
        yield from list(plain)[:taken]
        raise WorkersLost("a worker was killed")

    plain, one.steps = one.steps, some()
    with pytest.raises(WorkersLost):
        one.fit()
    last = last_checkpoint(tmp_path)
    assert (last.step if last else 0) == taken == len(one.metrics.records)


def test_fit__a_signal_after_the_last_step_is_the_end_itself(trainer, tmp_path):
    one = trainer([1.0, 1.0], stop_after=2, every_steps=100)
    one.fit()
    assert last_checkpoint(tmp_path).step == 2 and one.monitor.ended == []


def test_run__too_many_bad_steps_are_in_the_report(request, make_corpus_once, tmp_path, monkeypatch):
    from meddino_pretrain import build

    plain = build.to_model_input

    def poisoned(raw, *where, **how):
        made = plain(raw, *where, **how)
        if raw.step:
            made.views["global_crops"][0, 0, 0, 0] = float("nan")
        return made

    monkeypatch.setattr(build, "to_model_input", poisoned)
    overrides = ["stages.stage1_pretrain.steps=4", "optimizer.max_bad_steps=2", "saving.report=true"]
    config = load_config(PretrainConfig, [request.path.with_name("tiny.yaml")], overrides)
    with pytest.raises(MedDINOError, match=r"2 steps in a row up to step 3.*last samples: s0.*needs a new one"):
        run_pretraining(config, make_corpus_once, tmp_path / "run", ["stage1_pretrain"])
    report = (tmp_path / "run" / "report.html").read_text()
    assert "diverging: The run is diverging: 2 of the last 3 steps were skipped" in report and "http-equiv" not in report
