"""A list of jobs that can be stopped, continued, listed, and spread over a job array; the tables come last."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from meddino.core.errors import ConfigError, MedDINOError
from meddino.core.files import canonical_json, sha256_file, sizes_below, write_text
from meddino.core.logging import get_logger
from meddino_evaluation.backbones.catalogue import CATALOGUE
from meddino_evaluation.backbones.load import RANDOM, load_backbone, named_model
from meddino_evaluation.backbones.weights_files import find_weights

DONE = "metrics.json"
_TABLES = {".csv", ".json", ".tsv", ".txt", ".xml"}
_log = get_logger(__name__)


@runtime_checkable
class Job(Protocol):
    """One training with its test."""

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and another one whenever anything about the job is different."""

    @property
    def title(self) -> str:
        """For people: which model is trained how."""

    def run(self, folder: Path) -> None:
        """Do it; metrics.json is written last."""


def list_lines(jobs: Sequence[Job], root: Path) -> str:
    """Return one line a job: its number, whether it is done, its folder."""
    states = ["done" if (root / job.folder / DONE).is_file() else "to do" for job in jobs]
    return "".join(f"{n:4d}  {state}  {job.folder}\n" for n, (job, state) in enumerate(zip(jobs, states, strict=True), start=1))


def run_jobs(jobs: Sequence[Job], root: Path, part: tuple[int, int] | None = None) -> list[str]:
    """Run those jobs that are not done.

    A job is done when its metrics.json is there, which is written last. A job that cannot run (weights that are missing, a
    data set that is refused) leaves its reason in error.txt, and the others go on; the same command tries it again.

    Args:
        jobs: In an order that does not depend on what is done already.
        root: Folder of the jobs' folders.
        part: (i, n): only every n-th job, from the i-th (1-based), for job arrays.

    Returns:
        One line for each reason for which jobs could not run.
    """
    chosen = [job for place, job in enumerate(jobs) if part is None or place % part[1] == part[0] - 1]
    problems: dict[str, list[str]] = {}
    for number, job in enumerate(chosen):
        folder = root / job.folder
        if (folder / DONE).is_file():
            continue
        _log.info("job %d of %d: %s (%s)", number + 1, len(chosen), job.title, folder)
        try:
            job.run(folder)
        except MedDINOError as error:
            write_text(folder / "error.txt", f"{error}\n")
            reason = "for the same reason as one before" if str(error) in problems else str(error)
            _log.error("job %s cannot run: %s", job.title, reason)
            problems.setdefault(str(error), []).append(job.folder)
        else:
            (folder / "error.txt").unlink(missing_ok=True)
    return [
        f"{reason} ({len(names)} jobs: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
        for reason, names in problems.items()
    ]


def parse_part(text: str | None) -> tuple[int, int] | None:
    """Read `--part i/n`; without it, a SLURM array's own numbers.

    Raises:
        ConfigError: It is no i/n with 1 <= i <= n.
    """
    if text is None and "SLURM_ARRAY_TASK_COUNT" in os.environ:
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        text = f"{int(os.environ['SLURM_ARRAY_TASK_ID']) - first + 1}/{os.environ['SLURM_ARRAY_TASK_COUNT']}"
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part {text}: write i/n with 1 <= i <= n, for example 1/8")
    return int(match[1]), int(match[2])


def folder_hash(root: Path, every_byte: bool = False) -> str:
    """Return a hash of which files lie in a folder, how long each is, and what its tables say: changed data are other jobs.

    Pictures are not read for it: one that is changed and keeps its length is not noticed.

    Args:
        root: The folder.
        every_byte: Read all files, of a folder of weights.
    """
    rows = [
        [path.relative_to(root).as_posix(), sha256_file(path) if every_byte or path.suffix.lower() in _TABLES else size]
        for path, size in sizes_below(root)
    ]
    return hashlib.sha256(canonical_json(sorted(rows)).encode()).hexdigest()


def weights_hash(model: str) -> str | None:
    """Return the hash of a model's weights, so that another export or a later step of a run under its name is another job.

    Of `random:<folder>` it is that of the weights that are drawn, so that another architecture there is another job. None for
    a model that is no more than its name, and for one that cannot be found: its jobs will say why.
    """
    spec = named_model(model)[1]
    if spec.startswith("hf:"):
        return folder_hash(Path(spec.removeprefix("hf:")), every_byte=True)
    architecture = spec.removeprefix(RANDOM)
    path = Path(spec.partition("@")[2] or spec)
    if spec.startswith(RANDOM):
        grows = any(Path(name).exists() for name in (architecture, architecture.rpartition("@")[0]) if name)
    else:
        grows = path.is_dir() and not (path / "model.safetensors").is_file()  # a run or a checkpoint
    try:
        if grows:
            return load_backbone(spec).hash()
        if spec in CATALOGUE:
            path = find_weights(spec, CATALOGUE[spec])
    except MedDINOError:
        return None
    path = path / "model.safetensors" if path.is_dir() else path
    return sha256_file(path) if path.is_file() else None
