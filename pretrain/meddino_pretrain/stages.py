"""The stage graph of a run: one stage after the other, each from where it stands."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from meddino.checkpoints.state.flat_state import OptimizerState
from meddino.core.device import Machine, find_machine, use_cpu_threads
from meddino.core.files import check_free_space
from meddino.core.logging import get_logger
from meddino.core.seeds import derive_seed
from meddino.data.corpus import Corpus
from meddino.distributed.collectives import barrier, is_main, world_size
from meddino.distributed.process_group import start_distributed
from meddino.models.registry import backbone_config
from meddino_pretrain.build import (
    build_networks,
    build_objective,
    build_stage_loader,
    build_stage_optimizer,
    build_trainer,
)
from meddino_pretrain.config import PretrainConfig, StageConfig
from meddino_pretrain.data.corrupt_samples import DamagedSlices
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.methods.dinov3.method import DINOv3Objective
from meddino_pretrain.monitoring.feature_metrics import HealthProbe
from meddino_pretrain.monitoring.fixed_slices import FixedSlices, fixed_slices
from meddino_pretrain.monitoring.metrics import open_metrics
from meddino_pretrain.monitoring.monitor import Watch
from meddino_pretrain.monitoring.progress import show_progress
from meddino_pretrain.monitoring.report import RunReport
from meddino_pretrain.monitoring.speed import measure_peak
from meddino_pretrain.plan import later_steps, plan_run, this_machine
from meddino_pretrain.run.checkpoints import StageCheckpoints, damaged_keys, last_checkpoint
from meddino_pretrain.run.corpus_audit import check_audit
from meddino_pretrain.run.folder import HEALTH_REFERENCE, RunFolder, open_run
from meddino_pretrain.run.initialization import Origin, find_origin, load_origin, read_init, take_init
from meddino_pretrain.run.signals import StopRequest, stop_on_signals

logger = get_logger(__name__)


def run_pretraining(
    config: PretrainConfig,
    corpus_folder: Path | str,
    out: Path,
    stages: Sequence[str] = (),
    caught: StopRequest | None = None,
) -> None:
    """Run the stages of a recipe, or go on where an earlier call stopped.

    Args:
        config: The recipe.
        corpus_folder: A corpus of `meddino-curate`, or its URL.
        out: The run's folder.
        stages: Only these; all if empty.
        caught: Where signals are noted already; None catches them from here on.

    Raises:
        MedDINOError: Wrong input, told in one line.
        StoppedEarly: A signal came; everything is saved.
    """
    config.check_stages(stages)
    backbone = backbone_config(config.backbone.name, **config.backbone.changes)
    for stage in config.stages.values():
        stage.crops.check_patch_size(backbone.patch_size)
    with start_distributed() as place, nullcontext(caught) if caught else stop_on_signals() as stop:
        machine = find_machine(config.machine.device, config.machine.precision, place.local_rank)
        if not machine.is_accelerator:
            use_cpu_threads()
        plan_run(config, this_machine(config, world_size(), measured=False), stages)  # memory, before anything is begun
        corpus = Corpus(corpus_folder)
        check_audit(corpus, config.corpus)
        intensities = Intensities(config.contracts)
        intensities.check(corpus.modalities)
        with open_run(out, config, corpus) as run:
            # The same size in every stage, so that looks can be compared along the whole run.
            first_size = next(iter(config.stages.values())).crops.sizes[0].global_px
            fixed = fixed_slices(corpus, intensities, config.health.slices, first_size)
            peak, report = measure_peak(machine), RunReport(run.folder, config)
            for name in stages or config.stages:
                stop.check(f"before {name}")
                run_stage(run, name, corpus, fixed, machine, peak, stop, report)
            if is_main():
                report.write(finished=True)


def run_stage(
    run: RunFolder,
    name: str,
    corpus: Corpus,
    fixed: FixedSlices,
    machine: Machine,
    peak: float,
    stop: StopRequest,
    report: RunReport,
) -> None:
    """Run one stage to its end; returns at once if it is there already, or is to be left out."""
    config, folder, seed = run.config, run.stage_folder(name), derive_seed(run.config.seed, "stage", name)
    begun = last_checkpoint(folder)
    if begun is not None and begun.step == config.stages[name].steps:
        logger.info("%s: done (%d steps)", name, begun.step)
        return
    origin = None if begun is not None else _begin(run, name, corpus, machine)
    stage = _as_chosen(run, name)
    if stage is None:
        return
    damaged = DamagedSlices(corpus.location, config.loader.max_damaged, origin.damaged if origin else damaged_keys(begun))
    damaged.check()
    objective = _build_objective(run, stage, seed, machine, origin)
    optimizer = build_stage_optimizer(config.optimizer, objective)
    checkpoints = StageCheckpoints(
        folder,
        state={**objective.networks, "optimizer": OptimizerState("optimizer", optimizer, objective.student)},
        teacher_backbone=objective.teacher.backbone,
        meta=run.checkpoint_meta(name, objective.student.backbone.config),
        saving=config.saving,
        steps=stage.steps,
        snapshot_steps=config.snapshots(name),
        damaged=damaged,
    )
    if begun is not None:
        checkpoints.resume(begun)
        logger.info("%s goes on after step %d of %d", name, begun.step, stage.steps)
    _check_room(folder, objective)
    probe = HealthProbe(fixed, config.health, machine, run.folder / HEALTH_REFERENCE)
    loader = build_stage_loader(config, stage, seed, corpus, machine, checkpoints.step)
    with open_metrics(folder, checkpoints.step, config.saving, run.run_id) as metrics:
        watch = Watch(run.folder, name, config, probe, objective.teacher, report, metrics)
        if begun is None:
            watch.begin(stage.schedule.teacher_temperature_start)
        later = later_steps(config, name)
        with show_progress(name, checkpoints.step, stage.steps, stage.global_batch, later) as progress:
            build_trainer(
                config, stage, objective, optimizer, loader, checkpoints, metrics, progress, watch, peak, stop, machine
            ).fit()
    barrier()


def _begin(run: RunFolder, name: str, corpus: Corpus, machine: Machine) -> Origin:
    backbone = backbone_config(run.config.backbone.name, **run.config.backbone.changes)
    origin = find_origin(run, name, backbone, corpus, machine)
    logger.info("%s starts from %s", name, origin.words)
    run.record_origin(name, origin.record(run.folder, run.config.stages[name].steps))
    return origin


def _as_chosen(run: RunFolder, name: str) -> StageConfig | None:
    """Return a stage's config after the choice of its Gram teacher; None if the stage is left out."""
    stage, action = run.config.stages[name], run.gram_action(name)
    if action == "skip":
        logger.info("%s is left out: patch quality did not fall", name)
        return None
    if action == "light" and stage.gram_teacher is not None:
        weight = stage.losses.gram_weight * stage.gram_teacher.light_multiplier
        return stage.model_copy(update={"losses": stage.losses.model_copy(update={"gram_weight": weight})})
    return stage


def _build_objective(run: RunFolder, stage: StageConfig, seed: int, machine: Machine, origin: Origin | None) -> DINOv3Objective:
    """Build the networks with the weights the stage starts from; a stage that goes on gets its own from the checkpoint."""
    student, teacher = build_networks(run.config)
    if origin is not None and stage.starts_from is None:
        weights = read_init(run.config.init, student.backbone.config)
        if weights is not None:
            take_init(weights, run.config.init.heads, {"student": student, "teacher": teacher})
            run.record_parent(weights.parent)
    objective = build_objective(run.config, stage, seed, machine, student, teacher)
    if origin is not None:
        load_origin(origin, objective)
    return objective


def _check_room(folder: Path, objective: DINOv3Objective) -> None:
    # Student with two moments, teacher, Gram teacher; once more, since the old one goes only after the new one stands.
    size = sum(p.numel() * p.element_size() for network in objective.networks.values() for p in network.parameters())
    moments = 2 * sum(p.numel() * p.element_size() for p in objective.student.parameters())
    check_free_space(folder, 2 * (size + moments), "two checkpoints")
