"""A new run that begins at a checkpoint of another one, with everything: networks, optimizer, position in the data."""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from meddino.checkpoints.state.verify import Checkpoint, verify_checkpoint
from meddino.core.config import differences, load_config, to_yaml
from meddino.core.errors import ConfigError
from meddino.core.files import write_json, write_text
from meddino.core.logging import get_logger
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.run.checkpoints import CHECKPOINTS, SNAPSHOTS, last_checkpoint
from meddino_pretrain.run.recipe_changes import begun_stages

BRANCHED = "branched_from"
logger = get_logger(__name__)


def branch_run(source: Path, out: Path, config: PretrainConfig) -> None:
    """Begin a run's folder at a checkpoint of another run; the recipe may differ in that stage and in later ones.

    The folder appears whole or not at all. One that was begun so already is left alone: the same command goes on.

    Args:
        source: A checkpoint's folder, or a run's, of which the newest one is taken.
        out: The new run's folder.
        config: The recipe of the new run.

    Raises:
        ConfigError: The folder is another run's, there is no checkpoint, or the recipe differs in what was learnt before.
        CheckpointError: The checkpoint is damaged.
    """
    found = _find_checkpoint(source)
    stage, run = str(found.meta["stage"]), found.folder.parents[2]
    origin = {"run": run.resolve().name, "stage": stage, "step": found.step}
    if out.exists() and any(out.iterdir()):
        if _branched_from(out) == origin:
            return
        raise ConfigError(f"{out} is not empty and was not branched from {found.folder}; choose another --out")
    earlier = _check_recipe(config, run, stage, found.step)
    partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    try:
        _copy_before(run, partial, earlier)
        _copy(found.folder, partial / stage / CHECKPOINTS / found.folder.name)
        for path in (run / stage / "metrics.jsonl", run / stage / SNAPSHOTS, *run.glob("*.safetensors"), *run.glob("*.txt")):
            _copy(path, partial / path.relative_to(run))
        info = json.loads((run / "run.json").read_text(encoding="utf-8"))
        stages = {
            name: {**start, "steps": config.stages[name].steps}
            for name, start in info["stages"].items()
            if name in (*earlier, stage)
        }
        write_text(partial / "config.yaml", to_yaml(config))
        write_json(
            partial / "run.json", {**info, "id": secrets.token_hex(6), "changes": [], "stages": stages, BRANCHED: origin}
        )
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s begins with %s after step %d of %s", out, stage, found.step, run)


def _find_checkpoint(source: Path) -> Checkpoint:
    if (source / "run.json").is_file():
        stages = begun_stages(source, list(load_config(PretrainConfig, [source / "config.yaml"]).stages))
        newest = last_checkpoint(source / stages[-1]) if stages else None
        if newest is None:
            raise ConfigError(f"run {source} has no checkpoint to branch from")
        return newest
    if source.parent.name != CHECKPOINTS or not source.is_dir():
        raise ConfigError(
            f"--branch-from {source} is neither a run's folder nor a checkpoint's, such as run/stage1_pretrain/{CHECKPOINTS}/"
            "step-000001000"
        )
    return verify_checkpoint(source)


def _branched_from(out: Path) -> Any:
    path = out / "run.json"
    return json.loads(path.read_text(encoding="utf-8")).get(BRANCHED) if path.is_file() else None


def _check_recipe(config: PretrainConfig, run: Path, stage: str, step: int) -> list[str]:
    """Return the stages before, whose recipe must be what they were trained with."""
    config.check_stages([stage])
    if config.stages[stage].steps <= step:
        raise ConfigError(
            f"stages.{stage}.steps is {config.stages[stage].steps}, the checkpoint stands after step {step}: give more"
        )
    old = load_config(PretrainConfig, [run / "config.yaml"])
    earlier = list(config.stages)[: list(config.stages).index(stage)]
    for name in earlier:
        before = old.stages[name].model_dump(mode="json") if name in old.stages else None
        changed = differences(before, config.stages[name].model_dump(mode="json"), f"stages.{name}")
        if changed:
            raise ConfigError(f"run {run} learnt {name} with another recipe (then -> now): {'; '.join(changed)}")
    return earlier


def _copy_before(run: Path, out: Path, stages: list[str]) -> None:
    for name in stages:
        last = last_checkpoint(run / name)
        if last is not None:
            _copy(last.folder, out / name / CHECKPOINTS / last.folder.name)
        for path in (run / name / "metrics.jsonl", run / name / SNAPSHOTS):
            _copy(path, out / path.relative_to(run))


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder that may be missing; large files that are never written again become links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link)
    elif source.is_file():
        shutil.copy2(source, target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
