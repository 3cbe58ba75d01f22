"""What a stage starts from: decided by the graph, loaded, and told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.checkpoints.state.names import META_FILE
from meddino.checkpoints.state.training_state import load_training_state
from meddino.checkpoints.weights.load import BackboneWeights, load_backbone_weights
from meddino.core.device import Machine
from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.logging import get_logger
from meddino.data.corpus import Corpus
from meddino.distributed.collectives import on_main
from meddino.models.registry import backbone_config, build_backbone
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.methods import method_class
from meddino_pretrain.methods.base import KeptChoice, Method, backbones_in
from meddino_pretrain.methods.config import KeptBackbone
from meddino_pretrain.monitoring.feature_metrics import snapshot_scores
from meddino_pretrain.monitoring.fixed_slices import fixed_slices
from meddino_pretrain.run.checkpoints import corrupt_keys, kept_steps, last_checkpoint, snapshot_folder
from meddino_pretrain.run.config import InitConfig
from meddino_pretrain.run.folder import RunFolder

SCRATCH, REQUIRED = "scratch", "required"
logger = get_logger(__name__)


@dataclass(frozen=True)
class Initialization:
    """What a stage starts from.

    Attributes:
        weights: Checkpoint folder of the stage before; None for the recipe's `init`.
        exported: Name of the backbone in that checkpoint, where the stage before had another method and it alone is taken.
        kept: Folder of the earlier stage's kept backbone that the method needs, or None.
        choice: How that was chosen, where it was measured.
        message: One line for people.
        corrupt: Keys of the corrupt samples that the stages before met.
    """

    weights: Path | None
    exported: str | None
    kept: Path | None
    choice: KeptChoice | None
    message: str
    corrupt: tuple[str, ...] = ()

    def record(self, run: Path, steps: int) -> dict[str, Any]:
        """Return it as JSON for run.json, paths relative to the run."""
        return {
            "message": self.message,
            "weights": None if self.weights is None else str(self.weights.relative_to(run)),
            "kept_backbone": None if self.kept is None else str(self.kept.relative_to(run)),
            "choice": None if self.choice is None else vars(self.choice),
            "steps": steps,
        }


def resolve_start(run: RunFolder, name: str, corpus: Corpus, machine: Machine) -> Initialization:
    """Decide what a stage starts from, from what lies in the run's folder.

    Args:
        run: The run.
        name: The stage.
        corpus: Where the slices come from that kept backbones are measured on.
        machine: Where they are measured.

    Raises:
        CheckpointError: The stage before is not finished, or a kept backbone is missing.
    """
    stage = run.config.stages[name]
    weights, before, exported, message = None, None, None, f"fresh weights (init.weights = {SCRATCH})"
    if stage.starts_from is None and run.config.init.weights != SCRATCH:
        message = f"{run.config.init.weights}"
    if stage.starts_from is not None:
        resolved = run.resolve_stage(stage.starts_from)
        before, wanted = last_checkpoint(run.stage_folder(resolved)), run.config.stages[resolved]
        if before is None or before.step != wanted.steps:
            raise CheckpointError(
                f"{name} starts from the end of {stage.starts_from}, which stands at step {before.step if before else 0} of "
                f"{wanted.steps}; run that stage first"
            )
        if type(wanted.method) is not type(stage.method):
            exported = str(before.meta["exported"])
        what = "networks" if exported is None else "exported backbone"
        weights, message = before.folder, f"{what} of {before.meta['stage']} after step {before.step}"
    wanted_kept = stage.method.kept_backbone
    if wanted_kept is None:
        return Initialization(weights, exported, None, None, message, corrupt_keys(before))
    choice, step = None, wanted_kept.step
    if step is None:
        choice = _measure(run, name, wanted_kept, corpus, machine)
        step = choice.step
    kept = _kept_folder(run, name, wanted_kept.stage, step)
    message += f"; kept backbone of {wanted_kept.stage} after step {step}" + (f" ({choice.message})" if choice else "")
    return Initialization(weights, exported, kept, choice, message, corrupt_keys(before))


def load_stage_weights(start: Initialization, method: Method) -> None:
    """Load what a stage starts from out of the run into spread networks (those of the recipe's `init` stay as they are).

    Raises:
        CheckpointError: The stage before had other networks.
    """
    if start.weights is None:
        return
    if start.exported is None:
        method.load_stage(start.weights, start.kept)
        return
    for backbone in backbones_in(method.networks()).values():
        load_training_state(start.weights, {start.exported: backbone})


def read_init(config: PretrainConfig) -> BackboneWeights | None:
    """Read the weights that the first stage starts from; None for fresh ones.

    Raises:
        ConfigError: The recipe continues from weights and none were given.
        CheckpointError: They cannot be read or do not fit.
    """
    init: InitConfig = config.init
    if init.weights == SCRATCH:
        return None
    if init.weights == REQUIRED:
        raise ConfigError(
            "this recipe continues from released weights: give init.weights=FILE (DINOv3's official file, a transformers "
            f"folder, timm:<name>@<file>, our export, a MedDINOv3 file), or init.weights={SCRATCH}"
        )
    backbone = backbone_config(config.backbone.name, **config.backbone.changes)
    return load_backbone_weights(init.weights, backbone, init.gaps, init.section)


def load_init_weights(weights: BackboneWeights, heads: str, method: Method) -> None:
    """Copy released weights into every backbone of a method, heads too where file and networks have them and they fit.

    Raises:
        CheckpointError: A head of the file has another shape.
    """
    networks = method.networks()
    for backbone in backbones_in(networks).values():
        weights.load_into(backbone)
    taken = set()
    for network in networks.values():
        parts = dict(network.named_children())
        for name, tensors in weights.heads.items() if heads == "if_there" else ():
            if name not in parts:
                continue
            wanted = {key: list(value.shape) for key, value in parts[name].state_dict().items()}
            found = {key: list(value.shape) for key, value in tensors.items()}
            if wanted != found:
                raise CheckpointError(
                    f"the file's {name} is {found}, the recipe's {wanted}; set method.heads.* to the file's sizes, or "
                    "init.heads=fresh"
                )
            parts[name].load_state_dict(tensors)
            taken.add(name)
    logger.info("heads: %s", f"{', '.join(sorted(taken))} from the file" if taken else "fresh")


def _kept_folder(run: RunFolder, name: str, kept_stage: str, step: int) -> Path:
    """Return where the backbone lies that an earlier stage kept for a stage.

    Raises:
        CheckpointError: It is not there any more; the message says which are, and what to do.
    """
    folder = snapshot_folder(run.stage_folder(kept_stage), step)

    def check() -> None:
        if not (folder / META_FILE).is_file():
            there = kept_steps(run.stage_folder(kept_stage))
            raise CheckpointError(
                f"{name} needs the backbone that {kept_stage} kept after step {step}; {folder} is missing (steps that are "
                f"there: {', '.join(map(str, there)) or 'none'}): put it back, or begin another --out at a checkpoint of "
                f"{kept_stage} from before that step (--branch-from), which keeps it again"
            )

    on_main(check)
    return folder


def _measure(run: RunFolder, name: str, wanted: KeptBackbone, corpus: Corpus, machine: Machine) -> KeptChoice:
    config, stage = run.config, run.config.stages[name]
    method = method_class(stage.method)
    earlier = config.stages[wanted.stage]
    size_px = method_class(earlier.method).views(earlier.method).main_px[0]
    fixed = fixed_slices(corpus, Intensities(config.contracts), wanted.slices, size_px)
    backbone = build_backbone(config.backbone.name, **config.backbone.changes).to(machine.device, machine.weight_dtype).eval()
    scores = {}
    folders = {step: _kept_folder(run, name, wanted.stage, step) for step in sorted(config.snapshots(wanted.stage))}
    for step, folder in folders.items():
        load_training_state(folder, {"backbone": backbone})
        scores[step] = snapshot_scores(backbone, fixed, machine)
    # One process decides for all: rounding must not let them differ.
    return on_main(lambda: method.choose_kept(stage.method, scores))
