"""What a stage starts from: decided by the graph, loaded, and told."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.checkpoints.state.training_state import load_training_state, on_main
from meddino.checkpoints.weights.load import BackboneWeights, load_backbone_weights
from meddino.core.device import Machine
from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.logging import get_logger
from meddino.data.corpus import Corpus
from meddino.models.registry import BackboneConfig, backbone_from_config
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.methods.dinov3.config import GramTeacherConfig
from meddino_pretrain.methods.dinov3.gram_choice import GramChoice, choose_gram_teacher
from meddino_pretrain.methods.dinov3.method import DINOv3Objective
from meddino_pretrain.methods.dinov3.network import DINOv3Network
from meddino_pretrain.monitoring.fixed_slices import fixed_slices
from meddino_pretrain.monitoring.patch_quality import snapshot_scores
from meddino_pretrain.run.checkpoints import damaged_keys, last_checkpoint, snapshot_folder
from meddino_pretrain.run.config import InitConfig
from meddino_pretrain.run.folder import RunFolder

SCRATCH, REQUIRED = "scratch", "required"
logger = get_logger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a stage starts from.

    Attributes:
        weights: Checkpoint folder of the stage before; None for the recipe's `init`.
        gram_teacher: Snapshot folder of the Gram teacher, or None.
        gram_choice: How it was chosen, where that was measured.
        words: One line for people.
        damaged: Keys of the damaged slices that the stages before met.
    """

    weights: Path | None
    gram_teacher: Path | None
    gram_choice: GramChoice | None
    words: str
    damaged: tuple[str, ...] = ()

    def record(self, run: Path, steps: int) -> dict[str, Any]:
        """Return it as JSON for run.json, paths relative to the run."""
        choice = None if self.gram_choice is None else vars(self.gram_choice)
        return {
            "words": self.words,
            "weights": None if self.weights is None else str(self.weights.relative_to(run)),
            "gram_teacher": None if self.gram_teacher is None else str(self.gram_teacher.relative_to(run)),
            "gram_choice": choice,
            "steps": steps,
        }


def find_origin(run: RunFolder, name: str, backbone: BackboneConfig, corpus: Corpus, machine: Machine) -> Origin:
    """Decide what a stage starts from, from what lies in the run's folder.

    Args:
        run: The run.
        name: The stage.
        backbone: Architecture, for measuring snapshots.
        corpus: Where the slices come from that they are measured on.
        machine: Where they are measured.

    Raises:
        CheckpointError: The stage before is not finished, or a snapshot for the Gram teacher is missing.
    """
    stage = run.config.stages[name]
    weights, before, words = None, None, f"fresh weights (init.weights = {SCRATCH})"
    if stage.starts_from is None and run.config.init.weights != SCRATCH:
        words = f"{run.config.init.weights}"
    if stage.starts_from is not None:
        before = last_checkpoint(run.stage_folder(run.standing_for(stage.starts_from)))
        wanted = run.config.stages[run.standing_for(stage.starts_from)].steps
        if before is None or before.step != wanted:
            raise CheckpointError(
                f"{name} starts from the end of {stage.starts_from}, which stands at step {before.step if before else 0} of "
                f"{wanted}; run that stage first"
            )
        weights, words = before.folder, f"student, teacher and heads of {before.meta['stage']} after step {before.step}"
    if stage.gram_teacher is None:
        return Origin(weights, None, None, words, damaged_keys(before))
    choice, step = None, stage.gram_teacher.step
    if step == "auto":
        choice = _measure(run, stage.gram_teacher, backbone, corpus, machine)
        step = choice.step
    gram = snapshot_folder(run.stage_folder(stage.gram_teacher.stage), step)
    words += f"; Gram teacher: EMA teacher of {stage.gram_teacher.stage} after step {step}"
    return Origin(weights, gram, choice, words + (f" ({choice.words})" if choice else ""), damaged_keys(before))


def load_origin(origin: Origin, objective: DINOv3Objective) -> None:
    """Load a stage's starting weights into spread networks (fresh ones of the recipe stay as they are)."""
    if origin.weights is not None:
        load_training_state(origin.weights, {"student": objective.student, "teacher": objective.teacher})
        if objective.leash_teacher is not None:
            load_training_state(origin.weights, {"teacher.backbone": objective.leash_teacher})
    if origin.gram_teacher is not None and objective.gram_teacher is not None:
        load_training_state(origin.gram_teacher, {"backbone": objective.gram_teacher})


def read_init(init: InitConfig, backbone: BackboneConfig) -> BackboneWeights | None:
    """Read the weights that the first stage starts from; None for fresh ones.

    Raises:
        ConfigError: The recipe continues from weights and none were given.
        CheckpointError: They cannot be read or do not fit.
    """
    if init.weights == SCRATCH:
        return None
    if init.weights == REQUIRED:
        raise ConfigError(
            "this recipe continues from released weights: give init.weights=FILE (DINOv3's official file, a transformers "
            f"folder, timm:<name>@<file>, our export, a MedDINOv3 file), or init.weights={SCRATCH}"
        )
    return load_backbone_weights(init.weights, backbone, init.gaps, init.section)


def take_init(weights: BackboneWeights, heads: str, networks: Mapping[str, DINOv3Network]) -> None:
    """Copy released weights into student and teacher, heads too where the file has them and they fit.

    Raises:
        CheckpointError: A head of the file has another shape.
    """
    for network in networks.values():
        weights.load_into(network.backbone)
        for name, tensors in weights.heads.items() if heads == "if_there" else ():
            head = network.get_submodule(name)
            wanted = {key: list(value.shape) for key, value in head.state_dict().items()}
            found = {key: list(value.shape) for key, value in tensors.items()}
            if wanted != found:
                raise CheckpointError(
                    f"the file's {name} is {found}, the recipe's {wanted}; set heads.* to the file's sizes, or init.heads=fresh"
                )
            head.load_state_dict(tensors)
    taken = sorted(weights.heads) if heads == "if_there" else []
    logger.info("heads: %s", f"{', '.join(taken)} from the file" if taken else "fresh")


def _measure(
    run: RunFolder, config: GramTeacherConfig, backbone: BackboneConfig, corpus: Corpus, machine: Machine
) -> GramChoice:
    size_px = run.config.stages[config.stage].crops.sizes[0].global_px
    fixed = fixed_slices(corpus, Intensities(run.config.contracts), config.choice.slices, size_px)
    see = backbone_from_config(backbone).to(machine.device, machine.weight_dtype).eval()
    scores = {}
    for step in sorted(run.config.snapshots(config.stage)):
        load_training_state(snapshot_folder(run.stage_folder(config.stage), step), {"backbone": see})
        scores[step] = snapshot_scores(see, fixed, machine)
    # One process decides for all: rounding must not let them differ.
    return on_main(lambda: choose_gram_teacher(scores, config.choice))
