"""What a run writes down about itself: metrics.jsonl (one object a step) and TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.files import write_text

# Times differ between two runs with the same seed; they stand apart so that what is left can be compared byte by byte.
TIMING = "timing"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line cut off by a kill is left out.

    Raises:
        CheckpointError: A line in the middle is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # Every complete line ends with a line feed, so what follows the last one was cut off.
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}, line {number}: no JSON object ({error}); remove the line or the file") from error
    return records


class MetricsWriter:
    """Appends one JSON object a step and mirrors its numbers to TensorBoard."""

    def __init__(self, folder: Path, step: int, tensorboard: bool, wandb_project: str | None = None) -> None:
        """Open the files of one stage.

        Args:
            folder: The stage's folder.
            step: Steps done so far; later records, from before a kill, are cut away.
            tensorboard: Also write TensorBoard events.
            wandb_project: Also log to this Weights & Biases project.

        Raises:
            ConfigError: Weights & Biases is asked for and not installed.
        """
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_text(self.path, "".join(_line(record) for record in kept))
        self._stream = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._wandb = None if wandb_project is None else _start_wandb(wandb_project, folder)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one step's record: "step", numbers, and "timing" with what the clock said."""
        self._stream.write(_line(record))
        self._stream.flush()
        flat = {**record, **record.get(TIMING, {})}
        numbers = {name: value for name, value in flat.items() if isinstance(value, int | float) and name != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def sync(self) -> None:
        """Make everything so far durable; called before a checkpoint counts as saved."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the files."""
        self._stream.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(project: str, folder: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("saving.wandb_project is set and wandb is not installed: pip install 'meddino[wandb]'") from error
    name = f"{folder.parent.name}-{folder.name}"
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(folder))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    return value
