"""When a stage saves, what it saves, and where it goes on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from meddino.checkpoints.state.names import META_FILE, checkpoint_name, list_checkpoints, prune_checkpoints
from meddino.checkpoints.state.training_state import load_training_state, save_training_state
from meddino.checkpoints.state.verify import Checkpoint, latest_checkpoint
from meddino.distributed.collectives import is_main
from meddino_pretrain.data.corrupt_samples import CorruptSamples
from meddino_pretrain.monitoring.metrics import MetricsWriter
from meddino_pretrain.run.background_save import BackgroundSaver, FrozenState
from meddino_pretrain.run.config import SavingConfig

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
CORRUPT = "corrupt_samples"


class StageCheckpoints:
    """The checkpoints of one stage, and the backbones that it keeps for later stages.

    Attributes:
        step: Steps done.
    """

    def __init__(
        self,
        folder: Path,
        state: Mapping[str, Any],
        backbone: nn.Module,
        meta: Mapping[str, Any],
        saving: SavingConfig,
        steps: int,
        snapshot_steps: frozenset[int],
        corrupt: CorruptSamples,
    ) -> None:
        """Say what belongs to the state.

        Args:
            folder: The stage's folder.
            state: What a checkpoint holds; see `save_training_state`.
            backbone: What is kept after `snapshot_steps`.
            meta: JSON that goes with both, without the step.
            saving: How often, and how many stay.
            steps: Length of the stage; its last step is always saved.
            snapshot_steps: After which steps the backbone is kept.
            corrupt: Those that the run has met; written into every checkpoint's meta.
        """
        self.folder, self.saving, self.steps, self.snapshot_steps = folder, saving, steps, snapshot_steps
        self.meta, self.corrupt, self.step = meta, corrupt, 0
        self._saved = 0  # before the first step there is nothing to save
        self._state, self._backbone = state, backbone
        self._saver, self._frozen = BackgroundSaver(), FrozenState()

    def resume(self, found: Checkpoint) -> None:
        """Load a checkpoint that was found valid."""
        load_training_state(found.folder, self._state, verify=False)
        self.step = self._saved = found.step

    def after_step(self, step: int, metrics: MetricsWriter | None, now: bool) -> None:
        """Save what is due after a step, in the background.

        Args:
            step: Steps done.
            metrics: Made durable first, so that no checkpoint is ahead of its trace.
            now: Save even if it is not due, unless this step is saved already.
        """
        self.step = step
        writes: list[tuple[Path, dict[str, Any]]] = []
        if step in self.snapshot_steps:
            writes.append((snapshot_folder(self.folder, step), self._frozen.copy({"backbone": self._backbone})))
        due = step != self._saved and (now or step == self.steps or step % self.saving.every_steps == 0)
        if due:
            self._saved = step
            if metrics is not None:
                metrics.sync()
            writes.append((self.folder / CHECKPOINTS / checkpoint_name(step), self._frozen.copy(self._state)))
        if writes:
            meta = {**self.meta, "step": step, CORRUPT: sorted(self.corrupt.keys)}
            self._saver.start(lambda: self._write(writes, meta, prune=due))

    def finish(self) -> None:
        """Wait until everything is on disk, and raise what went wrong on the way."""
        self._saver.wait()

    def _write(self, writes: Sequence[tuple[Path, dict[str, Any]]], meta: Mapping[str, Any], prune: bool) -> None:
        for folder, state in writes:
            save_training_state(folder, state, meta)
        if prune and is_main():
            prune_checkpoints(self.folder / CHECKPOINTS, self.saving.keep_last, self.saving.keep_every_steps)


def snapshot_folder(stage_folder: Path, step: int) -> Path:
    """Return where a stage keeps the backbone of a step."""
    return stage_folder / SNAPSHOTS / checkpoint_name(step)


def kept_steps(stage_folder: Path) -> list[int]:
    """Return the steps whose backbone a stage has kept, as far as names and the presence of their meta.json tell."""
    return [
        int(path.name.rsplit("-", 1)[1]) for path in list_checkpoints(stage_folder / SNAPSHOTS) if (path / META_FILE).is_file()
    ]


def corrupt_keys(checkpoint: Checkpoint | None) -> tuple[str, ...]:
    """Return the keys of the corrupt samples that a run had met when it saved."""
    return () if checkpoint is None else tuple(checkpoint.meta.get(CORRUPT, ()))


def last_checkpoint(stage_folder: Path) -> Checkpoint | None:
    """Return the newest valid checkpoint of a stage."""
    return latest_checkpoint(stage_folder / CHECKPOINTS)
