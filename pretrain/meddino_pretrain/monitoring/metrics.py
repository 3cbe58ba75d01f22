"""What a run records about itself: metrics.jsonl (one object a step) and TensorBoard."""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.files import atomic_write
from meddino.distributed.collectives import is_main
from meddino_pretrain.run.config import SavingConfig

# Times differ between two runs with the same seed; they stand apart so that what is left can be compared byte by byte.
TIMING = "timing"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line cut off by a kill is left out.

    Raises:
        CheckpointError: A line in the middle is damaged.
    """
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        return [parse_line(line, path, number) for number, line in enumerate(complete_lines(stream), start=1)]


def parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Return the record of one line.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}, line {number}: no JSON object ({error}); remove the line or the file") from error


def complete_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield lines; each ends with a line feed, so what follows the last one was cut off by a kill and is left out."""
    for line in stream:
        if line.endswith(b"\n"):
            yield line


def _lines_until(stream: IO[bytes], path: Path, step: int) -> Iterator[bytes]:
    """Yield the lines up to a step; a crash may have left NUL bytes behind them, which are cut away with the rest."""
    last = 0
    try:
        for number, line in enumerate(complete_lines(stream), start=1):
            last = int(parse_line(line, path, number)["step"])
            if last <= step:
                yield line
    except CheckpointError:
        if last < step:
            raise


class MetricsWriter:
    """Appends one JSON object a step and mirrors its numbers to TensorBoard."""

    def __init__(self, folder: Path, step: int, tensorboard: bool, wandb_project: str | None = None, run_id: str = "") -> None:
        """Open the files of one stage.

        Args:
            folder: The stage's folder.
            step: Steps done so far; later records, from before a kill, are cut away.
            tensorboard: Also write TensorBoard events.
            wandb_project: Also log to this Weights & Biases project.
            run_id: Tells runs there apart that have a folder of the same name.

        Raises:
            ConfigError: Weights & Biases is asked for and not installed.
        """
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            with self.path.open("rb") as old, atomic_write(self.path) as new:
                new.writelines(_lines_until(old, self.path, step))
        self._stream = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._wandb = None if wandb_project is None else _start_wandb(wandb_project, folder, run_id)

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

    def write_pictures(self, pictures: Mapping[str, bytes], step: int) -> None:
        """Show PNG files in TensorBoard."""
        if self._board is not None:
            for name, png in pictures.items():
                with Image.open(io.BytesIO(png)) as picture:
                    self._board.add_image(f"pictures/{name}", np.asarray(picture), step, dataformats="HWC")

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


@contextmanager
def open_metrics(folder: Path, step: int, saving: SavingConfig, run_id: str) -> Iterator[MetricsWriter | None]:
    """Write a stage's metrics for as long as the block lasts; None in all processes but the first."""
    writer = MetricsWriter(folder, step, saving.tensorboard, saving.wandb_project, run_id) if is_main() else None
    try:
        yield writer
    finally:
        if writer is not None:
            writer.close()


def _start_wandb(project: str, folder: Path, run_id: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("saving.wandb_project is set and wandb is not installed: pip install 'meddino[wandb]'") from error
    name = f"{folder.parent.name}-{folder.name}"
    # Two people's folders may have the same name; with the same id they would write into one another's run.
    return wandb.init(project=project, name=name, id=f"{run_id}-{folder.name}", resume="allow", dir=str(folder))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    return value
