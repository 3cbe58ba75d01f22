"""The stage graph of a run: what each stage starts from, and running one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meddino.checkpoints.flat_state import OptimizerState
from meddino.checkpoints.training_state import load_training_state
from meddino.core.device import Machine, find_machine, use_cpu_threads
from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.files import check_free_space
from meddino.core.logging import get_logger
from meddino.core.seeds import derive_seed
from meddino.data.corpus import Corpus
from meddino.distributed.collectives import barrier, is_main
from meddino.distributed.process_group import start_distributed
from meddino_pretrain.build import (
    build_networks,
    build_objective,
    build_stage_loader,
    build_stage_optimizer,
    build_trainer,
)
from meddino_pretrain.checkpointing import StageCheckpoints, last_checkpoint, snapshot_folder
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.metrics import MetricsWriter
from meddino_pretrain.objectives.dinov3 import DINOv3Objective
from meddino_pretrain.progress import show_progress
from meddino_pretrain.report import write_report
from meddino_pretrain.run_folder import RunFolder, open_run
from meddino_pretrain.signals import StopRequest, stop_on_signals

logger = get_logger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a stage starts from.

    Attributes:
        weights: Checkpoint folder of the stage before, or None for fresh weights (or those of `init`).
        gram_teacher: Snapshot folder of the Gram teacher, or None.
        words: One line for people.
    """

    weights: Path | None
    gram_teacher: Path | None
    words: str


def run_pretraining(config: PretrainConfig, corpus_folder: Path, out: Path, stages: Sequence[str] = ()) -> None:
    """Run the stages of a recipe, or go on where an earlier call stopped.

    Args:
        config: The recipe.
        corpus_folder: A corpus of `meddino-curate`.
        out: The run's folder.
        stages: Only these; all if empty.

    Raises:
        MedDINOError: Wrong input, told in one line.
        StoppedEarly: A signal came; everything is saved.
    """
    unknown = [name for name in stages if name not in config.stages]
    if unknown:
        raise ConfigError(f"no stage '{unknown[0]}' in this recipe; its stages: {', '.join(config.stages)}")
    with start_distributed() as place, stop_on_signals() as stop:
        machine = find_machine(config.machine.device, config.machine.precision, place.local_rank)
        if not machine.is_accelerator:
            use_cpu_threads()
        corpus = Corpus(corpus_folder)
        with open_run(out, config, corpus) as run:
            for name in stages or config.stages:
                run_stage(run, name, corpus, machine, stop)
                if is_main():
                    write_report(run.folder, config)


def run_stage(run: RunFolder, name: str, corpus: Corpus, machine: Machine, stop: StopRequest) -> None:
    """Run one stage to its end; returns at once if it is there already."""
    config, stage, folder = run.config, run.config.stages[name], run.stage_folder(name)
    done = last_checkpoint(folder)
    if done is not None and done.step == stage.steps:
        logger.info("%s: done (%d steps)", name, stage.steps)
        return
    seed = derive_seed(config.seed, "stage", name)
    student, teacher = build_networks(config)
    objective = build_objective(config, stage, seed, machine, student, teacher)
    optimizer = build_stage_optimizer(config.optimizer, objective)
    checkpoints = StageCheckpoints(
        folder,
        state={**objective.networks, "optimizer": OptimizerState("optimizer", optimizer, objective.student)},
        teacher_backbone=objective.teacher.backbone,
        meta=run.checkpoint_meta(name, objective.student.backbone.config),
        saving=config.saving,
        steps=stage.steps,
        snapshot_steps=config.snapshot_steps(name),
    )
    if checkpoints.resume() == 0:
        origin = find_origin(run, name)
        logger.info("%s starts from %s", name, origin.words)
        run.record_origin(name, origin.words, origin.weights, origin.gram_teacher)
        _start_from(origin, objective)
    else:
        logger.info("%s goes on after step %d of %d", name, checkpoints.step, stage.steps)
    _check_room(folder, objective)
    loader = build_stage_loader(config, stage, seed, corpus, machine, checkpoints.step)
    metrics = MetricsWriter(folder, checkpoints.step, config.saving.tensorboard) if is_main() else None
    try:
        with show_progress(name, checkpoints.step, stage.steps, stage.global_batch) as progress:
            build_trainer(config, stage, objective, optimizer, loader, checkpoints, metrics, progress, stop, machine).fit()
    finally:
        if metrics is not None:
            metrics.close()
    barrier()


def find_origin(run: RunFolder, name: str) -> Origin:
    """Decide what a stage starts from: the graph's own decision, from what lies in the run folder.

    Raises:
        CheckpointError: The stage before is not finished, or its snapshot for the Gram teacher is missing.
    """
    stage = run.config.stages[name]
    weights, gram, words = None, None, f"init = {run.config.init}"
    if stage.starts_from is not None:
        before = last_checkpoint(run.stage_folder(stage.starts_from))
        wanted = run.config.stages[stage.starts_from].steps
        if before is None or before.step != wanted:
            raise CheckpointError(
                f"{name} starts from the end of {stage.starts_from}, which stands at step {before.step if before else 0} of "
                f"{wanted}; run that stage first"
            )
        weights, words = before.folder, f"student, teacher and heads of {stage.starts_from} after step {before.step}"
    if stage.gram_teacher is not None:
        gram = snapshot_folder(run.stage_folder(stage.gram_teacher.stage), stage.gram_teacher.step)
        words += f"; Gram teacher: EMA teacher of {stage.gram_teacher.stage} after step {stage.gram_teacher.step}"
    return Origin(weights, gram, words)


def _start_from(origin: Origin, objective: DINOv3Objective) -> None:
    if origin.weights is not None:
        load_training_state(origin.weights, {"student": objective.student, "teacher": objective.teacher})
    if origin.gram_teacher is not None and objective.gram_teacher is not None:
        load_training_state(origin.gram_teacher, {"backbone": objective.gram_teacher})


def _check_room(folder: Path, objective: DINOv3Objective) -> None:
    # Student with two moments, teacher, Gram teacher; once more, since the old one goes only after the new one stands.
    size = sum(p.numel() * p.element_size() for network in objective.networks.values() for p in network.parameters())
    moments = 2 * sum(p.numel() * p.element_size() for p in objective.student.parameters())
    check_free_space(folder, 2 * (size + moments), "two checkpoints")
