"""A new run that begins at a checkpoint of another one, with everything: networks, optimizer, position in the data."""

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.checkpoints.state.names import checkpoint_name
from meddino.checkpoints.state.verify import Checkpoint, verify_checkpoint
from meddino.core.config import differences, to_yaml
from meddino.core.errors import ConfigError
from meddino.core.files import write_json, write_text
from meddino.core.logging import get_logger
from meddino.data.overlap import VOLUMES_FILE
from meddino_pretrain.build import check_views
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.run.checkpoints import CHECKPOINTS, SNAPSHOTS, kept_steps, last_checkpoint
from meddino_pretrain.run.folder import PROBE_REFERENCE, read_info, read_recipe
from meddino_pretrain.run.recipe_changes import begun_stages

BRANCHED = "branched_from"
# What the checkpoint's weights are: another value would say of them what is not true. All else may be another from there on.
SETTLED = ("init", "input_contract", "other_contracts", "backbone")
# The same of the stage that is gone on with, so far as the rest of it may be another.
SETTLED_IN_STAGE = (["starts_from"], ["method", "name"])
logger = get_logger(__name__)


@dataclass(frozen=True)
class BranchPoint:
    """Where a new run leaves another one.

    Attributes:
        run: The other run.
        checkpoint: What the new one begins with.
        stage: Of the checkpoint.
        earlier: The stages before.
        changes: Of the recipe, all of them allowed: one line each.
        probe: Whether both runs measure the same slices.
    """

    run: Path
    checkpoint: Checkpoint
    stage: str
    earlier: list[str]
    changes: list[str]
    probe: bool


def branch_run(source: Path, out: Path, config: PretrainConfig) -> None:
    """Begin a run's folder at a checkpoint of another run; the recipe may differ in what is learnt from there on.

    The folder appears whole or not at all. One that was begun so already is left alone: the same command goes on.

    Args:
        source: A checkpoint's folder, or a run's, of which the newest one is taken.
        out: The new run's folder.
        config: The recipe of the new run.

    Raises:
        MedDINOError: As for `find_branch`.
    """
    point = find_branch(source, out, config)
    if point is None:
        return
    run, stage, folder = point.run, point.stage, point.checkpoint.folder
    partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    try:
        _copy_before(run, partial, point.earlier)
        _copy(folder, partial / stage / CHECKPOINTS / folder.name)
        features = [path for path in run.glob("*.safetensors") if point.probe or path.name != PROBE_REFERENCE]
        for path in (run / stage / "metrics.jsonl", run / stage / SNAPSHOTS, *features, *run.glob("*.txt")):
            _copy(path, partial / path.relative_to(run))
        if any(line.startswith("corpus.sampling") for line in point.changes):
            _keep_lists(run, partial)
        write_text(partial / "config.yaml", to_yaml(config))
        write_json(partial / "run.json", _new_info(point, config))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for line in point.changes:
        logger.info("goes on with another %s", line)
    logger.info("%s begins with %s after step %d of %s", out, stage, point.checkpoint.step, run)


def find_branch(source: Path, out: Path, config: PretrainConfig) -> BranchPoint | None:
    """Return where a new run leaves another one; None where its folder was begun so already. Writes nothing.

    Raises:
        ConfigError: The folder is another run's, there is no checkpoint, the recipe differs in what the checkpoint was learnt
            with, or a later stage needs a backbone that was not kept.
        MedDINOError: The checkpoint or a run.json is damaged.
    """
    source = source.resolve()
    if out.exists() and any(out.iterdir()):
        if _was_begun_so(source, out):
            return None
        raise ConfigError(
            f"{out} is not empty and was not branched from {source}; choose another --out, or leave out --branch-from if it is "
            "a run that shall go on"
        )
    found = _find_checkpoint(source)
    stage, run = str(found.meta["stage"]), found.folder.parents[2]
    old = read_recipe(run)
    earlier, changes = check_recipe(config, old, stage, found)
    _check_kept(config, run, stage, found.step)
    specs = (check_views(each) for each in (old, config))
    first_px, now_px = (next(iter(spec.values())).main_px[0] for spec in specs)
    probe = (old.probe.slices, first_px) == (config.probe.slices, now_px)
    return BranchPoint(run, found, stage, earlier, changes, probe)


def _find_checkpoint(source: Path) -> Checkpoint:
    if (source / "run.json").is_file():
        stages = begun_stages(source, list(read_recipe(source).stages))
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


def _was_begun_so(source: Path, out: Path) -> bool:
    """Tell whether a folder is a run that was branched from a source.

    A run that has moved on, or has deleted the checkpoint, is still the one: its id says so, not its newest checkpoint.
    """
    origin = read_info(out).get(BRANCHED) if (out / "run.json").is_file() else None
    if origin is None:
        return False
    is_run = (source / "run.json").is_file()
    if origin.get("id") is None:  # branched before ids were recorded
        found = _find_checkpoint(source)
        return _origin(found.folder.parents[2], found) | {"id": None} == {**origin, "id": None}
    run = source if is_run else source.parent.parent.parent
    if not (run / "run.json").is_file() or read_info(run).get("id") != origin["id"]:
        return False
    return is_run or (source.parent.parent.name, source.name) == (origin["stage"], checkpoint_name(origin["step"]))


def _origin(run: Path, found: Checkpoint) -> dict[str, Any]:
    return {"run": run.resolve().name, "id": read_info(run).get("id"), "stage": str(found.meta["stage"]), "step": found.step}


def _new_info(point: BranchPoint, config: PretrainConfig) -> dict[str, Any]:
    """Return the new run.json: what the other run's says of the time before, and what is another from here on."""
    info, order = read_info(point.run), [*point.earlier, point.stage]
    after = {"stage": point.stage, "step": point.checkpoint.step}

    def is_before(change: dict[str, Any]) -> bool:
        stage, step = change["after"]["stage"], change["after"]["step"]
        return stage in point.earlier or (stage == point.stage and step <= point.checkpoint.step)

    changes = [change for change in info.get("changes", []) if is_before(change)]
    stages = {name: {**info["stages"][name], "steps": config.stages[name].steps} for name in info["stages"] if name in order}
    return {
        **info,
        "id": secrets.token_hex(6),
        "changes": [*changes, *([{"after": after, "keys": point.changes}] if point.changes else [])],
        "stages": stages,
        BRANCHED: _origin(point.run, point.checkpoint),
    }


def check_recipe(config: PretrainConfig, old: PretrainConfig, stage: str, found: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the stages before a checkpoint's, and what differs between two recipes, one line a key.

    Args:
        config: The new run's recipe.
        old: The other run's.
        stage: Of the checkpoint.
        found: The checkpoint.

    Raises:
        ConfigError: Something differs that the checkpoint was learnt with, or its stage is no longer than it.
    """
    config.check_stages([stage])
    if config.stages[stage].steps <= found.step:
        raise ConfigError(
            f"stages.{stage}.steps is {config.stages[stage].steps}, the checkpoint stands after step {found.step}: give more"
        )
    earlier = list(config.stages)[: list(config.stages).index(stage)]

    def is_settled(line: str) -> bool:
        parts = line.split(": ", 1)[0].split(".")
        if parts[0] != "stages":
            return parts[0] in SETTLED
        return parts[1] in earlier or (parts[1] == stage and parts[2:] in SETTLED_IN_STAGE)

    changes = differences(old.model_dump(mode="json"), config.model_dump(mode="json"))
    refused = [line for line in changes if is_settled(line)]
    before, now = (_kept_text(each, stage) for each in (old, config))
    if before != now:
        refused.append(f"the kept backbone of stages.{stage}.method, which is in the checkpoint: {before} -> {now}")
    if refused:
        raise ConfigError(
            f"checkpoint {found.folder} was learnt with another recipe (then -> now): {'; '.join(refused)}; give these as they "
            "were then"
        )
    return earlier, changes


def _kept_text(config: PretrainConfig, stage: str) -> str:
    kept = config.stages[stage].method.kept_backbone if stage in config.stages else None
    return "none" if kept is None else f"{kept.stage} after step {'auto' if kept.step is None else kept.step}"


def _check_kept(config: PretrainConfig, run: Path, stage: str, step: int) -> None:
    """Refuse a recipe whose later stages need a backbone from before the checkpoint that the run has not kept."""
    order = list(config.stages)
    for name in order[order.index(stage) + 1 :]:
        kept = config.stages[name].method.kept_backbone
        if kept is None or kept.stage not in order[: order.index(stage) + 1]:
            continue
        steps = config.snapshots(kept.stage) if kept.step is None else {kept.step}
        there = kept_steps(run / kept.stage)
        gone = [each for each in sorted(steps) if each not in there and (kept.stage != stage or each <= step)]
        if gone:
            raise ConfigError(
                f"stages.{name}.method needs the backbone of {kept.stage} after step {', '.join(map(str, gone))}, from before "
                f"the checkpoint ({stage}, step {step}); {run} has kept it after {', '.join(map(str, there)) or 'no step'}: "
                "ask for what is there, or branch from an earlier checkpoint"
            )


def _copy_before(run: Path, out: Path, stages: list[str]) -> None:
    for name in stages:
        last = last_checkpoint(run / name)
        if last is not None:
            _copy(last.folder, out / name / CHECKPOINTS / last.folder.name)
        for path in (run / name / "metrics.jsonl", run / name / SNAPSHOTS):
            _copy(path, out / path.relative_to(run))


def _keep_lists(run: Path, out: Path) -> None:
    """Put the other run's list of training volumes into its checkpoints: the new run's own may come to name more."""
    for checkpoint in out.glob(f"*/{CHECKPOINTS}/*"):
        if not (checkpoint / VOLUMES_FILE).exists():
            _copy(run / VOLUMES_FILE, checkpoint / VOLUMES_FILE)


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
