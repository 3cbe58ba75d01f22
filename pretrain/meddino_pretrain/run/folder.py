"""The folder of a run: its resolved recipe, its stage graph, and who may write into it."""

import fcntl
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.checkpoints.export.lineage import corpus_lineage, write_volume_list
from meddino.checkpoints.export.model_folder import ParentRecord
from meddino.core.config import StrictConfig, differences, load_config, to_yaml
from meddino.core.errors import ConfigError, MedDINOError
from meddino.core.files import write_json, write_text
from meddino.core.logging import get_logger
from meddino.data.corpus import Corpus
from meddino.data.overlap import VOLUMES_FILE
from meddino.distributed.collectives import is_main, on_main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.methods import method_class
from meddino_pretrain.methods.config import Action
from meddino_pretrain.run.recipe_changes import begun_stages, may_change, progress_of
from meddino_pretrain.run.trained_volumes import trained_volumes

RUN_FORMAT = "meddino-run"
RUN_VERSION = 2
PROBE_REFERENCE = "probe_reference.safetensors"
logger = get_logger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """An opened run.

    Attributes:
        folder: Where it lies.
        config: Its recipe.
        corpus_hash: Names the corpus it learns from.
        corpus_lineage: Its data sets and licences, for the lineage of the weights.
        run_id: Random, kept in run.json: tells this run from others of the same folder name, where runs of many meet.
    """

    folder: Path
    config: PretrainConfig
    corpus_hash: str
    corpus_lineage: dict[str, Any]
    run_id: str

    def stage_folder(self, name: str) -> Path:
        """Return a stage's folder."""
        return self.folder / name

    def checkpoint_meta(self, stage: str, backbone: StrictConfig, exported: str) -> dict[str, Any]:
        """Return what a checkpoint says of itself besides its step: all that an export needs.

        Args:
            stage: The stage.
            backbone: Its architecture.
            exported: Name of the exported backbone in the checkpoint.
        """
        return {
            "stage": stage,
            "backbone": {"name": self.config.backbone.name, **backbone.model_dump(mode="json")},
            "exported": exported,
            "input_contract": self.config.input_contract.model_dump(mode="json"),
            "lineage": self._lineage(stage),
            "corpus_hash": self.corpus_hash,
            "config": self.config.model_dump(mode="json"),
        }

    def record_start(self, stage: str, start: dict[str, Any]) -> None:
        """Write into run.json what a stage started from."""
        on_main(lambda: self._update(lambda info: info["stages"].update({stage: start})))

    def record_parent(self, parent: ParentRecord) -> None:
        """Write into run.json which released weights the run started from."""
        on_main(lambda: self._update(lambda info: info.update(parent=parent.model_dump(mode="json"))))

    def chosen_action(self, stage: str) -> Action:
        """Return what the choice of a kept backbone decided for a stage: run, light or skip."""
        choice = self._info()["stages"].get(stage, {}).get("choice")
        action: Action = "run" if choice is None else choice["action"]
        return action

    def resolve_stage(self, stage: str) -> str:
        """Return the stage itself, or the one before it if it was left out."""
        before = self.config.stages[stage].starts_from
        return self.resolve_stage(before) if before is not None and self.chosen_action(stage) == "skip" else stage

    def _info(self) -> dict[str, Any]:
        return on_main(lambda: read_info(self.folder))

    def _update(self, change: Callable[[dict[str, Any]], None]) -> None:
        info = read_info(self.folder)
        change(info)
        write_json(self.folder / "run.json", info)

    def _lineage(self, stage: str) -> dict[str, Any]:
        chain: list[str] = []
        name: str | None = stage
        while name is not None:
            if self.chosen_action(name) != "skip":
                chain.insert(0, name)
            name = self.config.stages[name].starts_from
        methods = [self.config.stages[each].method for each in chain]
        sizes = sorted({side for method in methods for side in method_class(method).views(method).main_px})
        return {
            **self.corpus_lineage,
            "stages": [{"stage": each, "steps": self.config.stages[each].steps} for each in chain],
            "parent": self._info().get("parent"),
            "resolutions_px_seen": sizes,
        }


@contextmanager
def open_run(folder: Path, config: PretrainConfig, corpus: Corpus) -> Iterator[RunFolder]:
    """Open a run's folder, new or begun, and keep other processes out for as long as the block lasts.

    Raises:
        ConfigError: It was begun with another recipe; the message says what differs.
        MedDINOError: It was begun on another corpus, is in use, or is no run's folder.
    """
    lock = None
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    try:
        run_id, lineage = on_main(lambda: _begin(folder, config, corpus, lock))
        yield RunFolder(folder, config, corpus.content_hash, lineage, run_id)
    finally:
        if lock is not None:
            lock.close()


def _begin(folder: Path, config: PretrainConfig, corpus: Corpus, lock: Any) -> tuple[str, dict[str, Any]]:
    """Write what a run's folder says before any step; return its id and the lineage of what it learns from."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise MedDINOError(f"another process is training into {folder}; wait for it or choose another --out") from error
    fresh: dict[str, Any] = {"format": RUN_FORMAT, "version": RUN_VERSION, "id": secrets.token_hex(6), "changes": []}
    known = (folder / "run.json").is_file()
    if not known and any(path.name != ".lock" for path in folder.iterdir()):
        raise MedDINOError(f"{folder} is not empty and holds no run (run.json is missing); choose another --out")
    info = {**fresh, **read_info(folder)} if known else fresh
    old = read_recipe(folder) if known else None
    begun = [] if old is None else begun_stages(folder, list(old.stages))
    if old is not None and begun:
        if info["corpus_hash"] != corpus.content_hash:
            raise MedDINOError(
                f"run {folder} learns from a corpus with the content {info['corpus_hash'][:12]}; {corpus.root} has "
                f"{corpus.content_hash[:12]} now; give the same corpus or another --out"
            )
        if changed := _changes(folder, old, config, begun):
            info["changes"] = [*info["changes"], {"after": progress_of(folder, begun), "keys": changed}]
    else:
        # No step was taken: a first command that was wrong binds nobody.
        info = {**info, "corpus_hash": corpus.content_hash, "parent": None, "stages": {}}
        (folder / PROBE_REFERENCE).unlink(missing_ok=True)
    write_text(folder / "config.yaml", to_yaml(config))
    # A run that was begun before weights of 0 counted goes on with its list; one that was branched off has learnt from more.
    listed = (folder / VOLUMES_FILE) if begun else None
    known_keys = (
        frozenset(listed.read_text(encoding="utf-8").split()) if listed is not None and listed.is_file() else frozenset()
    )
    volumes = trained_volumes(corpus, config.corpus.sampling, known_keys)
    write_volume_list(folder, volumes)
    write_json(folder / "run.json", info)  # last: what has a run.json also has a config.yaml
    return str(info["id"]), corpus_lineage(corpus, volumes)


def read_recipe(folder: Path) -> PretrainConfig:
    """Return the recipe that a run was begun with.

    Raises:
        MedDINOError: Its config.yaml is missing or damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise MedDINOError(f"{folder} is damaged: config.yaml is missing; put it back, or choose another --out")
    try:
        return load_config(PretrainConfig, [path])
    except ConfigError as error:
        raise MedDINOError(f"{folder} is damaged ({error}); put its config.yaml back, or choose another --out") from error


def _changes(folder: Path, old: PretrainConfig, config: PretrainConfig, begun: Sequence[str]) -> list[str]:
    """Return what differs from the recipe that a run was begun with, all of it allowed; refuse what is not."""
    changed = differences(old.model_dump(mode="json"), config.model_dump(mode="json"))
    refused = [line for line in changed if not may_change(line, begun)]
    if refused:
        raise ConfigError(
            f"run {folder} was begun with another recipe; differences (begun -> now): {'; '.join(refused)}; "
            "give the recipe it was begun with, or another --out (which --branch-from begins at a checkpoint of this run)"
        )
    for line in changed:
        logger.info("goes on with another %s", line)
    if any(line.startswith("probe.slices:") for line in changed):
        logger.warning("probe.slices is another: drift is measured against the next probe from here on")
        (folder / PROBE_REFERENCE).unlink(missing_ok=True)
    return changed


def read_info(folder: Path) -> dict[str, Any]:
    """Return what a run's run.json says.

    Raises:
        MedDINOError: It is damaged, or another version's.
    """
    path = folder / "run.json"
    try:
        info = dict(json.loads(path.read_text(encoding="utf-8")))
        if info["format"] != RUN_FORMAT or info["version"] != RUN_VERSION:
            raise MedDINOError(
                f"{path}: format {info['format']} version {info['version']}; this MedDINO goes on with version {RUN_VERSION}: "
                "finish the run with the MedDINO that began it, or take its checkpoint into a new one by init.weights"
            )
        return {**info, "stages": dict(info["stages"]), "corpus_hash": str(info["corpus_hash"])}
    except (ValueError, KeyError, TypeError) as error:
        raise MedDINOError(f"{path} is damaged ({error}); choose another --out") from error
