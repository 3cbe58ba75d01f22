"""Which keys of a recipe may change while its run goes on, and how far the run is."""

from collections.abc import Sequence
from pathlib import Path

from meddino.checkpoints.state.names import list_checkpoints
from meddino_pretrain.run.checkpoints import CHECKPOINTS, SNAPSHOTS

# None of it changes what is learnt, beyond rounding: where it runs, how it is read and saved, how it is watched.
SECTIONS = ("corpus", "machine", "loader", "saving", "probe", "monitoring", "diagnosis")


def begun_stages(run: Path, stages: Sequence[str]) -> list[str]:
    """Return the stages in which a step was taken, as far as the run's folder knows."""
    return [name for name in stages if _has_begun(run / name)]


def progress_of(run: Path, begun: Sequence[str]) -> dict[str, str | int]:
    """Return where a run goes on: the last stage begun and the step of its newest checkpoint."""
    saved = list_checkpoints(run / begun[-1] / CHECKPOINTS)
    return {"stage": begun[-1], "step": int(saved[-1].name.rsplit("-", 1)[1]) if saved else 0}


def may_change(line: str, begun: Sequence[str]) -> bool:
    """Tell whether a run may go on with a difference.

    Args:
        line: Of `differences`: "key: old -> new".
        begun: Stages in which a step was taken.
    """
    parts = line.split(": ", 1)[0].split(".")
    if parts[:2] == ["corpus", "sampling"]:
        return False
    if parts[0] != "stages":
        return parts[0] in SECTIONS
    # Micro-batches change memory only. A stage's length is in its schedules, so it is settled once the stage has begun.
    return len(parts) == 3 and (parts[2] == "accumulation" or (parts[2] == "steps" and parts[1] not in begun))


def _has_begun(stage: Path) -> bool:
    metrics = stage / "metrics.jsonl"
    return (
        (metrics.is_file() and metrics.stat().st_size > 0)
        or bool(list_checkpoints(stage / CHECKPOINTS))
        or bool(list_checkpoints(stage / SNAPSHOTS))
    )
