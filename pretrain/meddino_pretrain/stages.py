"""The stage graph of a run: one stage after the other, each from where it stands."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from meddino.checkpoints.state.flat_state import OptimizerState
from meddino.core.device import Machine, find_machine, use_cpu_threads
from meddino.core.files import check_free_space
from meddino.core.logging import get_logger
from meddino.core.seeds import derive_seed
from meddino.data.corpus import Corpus
from meddino.data.joined_corpus import open_corpora
from meddino.distributed.collectives import barrier, is_main, world_size
from meddino.distributed.process_group import check_one_process_a_gpu, start_distributed
from meddino_pretrain.build import (
    build_loader,
    build_method,
    build_speed_meter,
    build_stage_optimizer,
    check_views,
    largest_px,
    spread_method,
    steps_of,
)
from meddino_pretrain.config import PretrainConfig, StageConfig
from meddino_pretrain.data.corrupt_samples import CorruptSamples
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.methods.base import Method, backbones_in
from meddino_pretrain.monitoring.feature_metrics import FeatureProbe
from meddino_pretrain.monitoring.fixed_slices import FixedSlices, fixed_slices
from meddino_pretrain.monitoring.labelled_probe import LabelledProbe
from meddino_pretrain.monitoring.metrics import open_metrics
from meddino_pretrain.monitoring.monitor import Monitor
from meddino_pretrain.monitoring.progress import show_progress
from meddino_pretrain.monitoring.report import RunReport
from meddino_pretrain.monitoring.speed import measure_peak
from meddino_pretrain.plan import later_steps, plan_run, this_machine
from meddino_pretrain.run.checkpoints import StageCheckpoints, corrupt_keys, last_checkpoint
from meddino_pretrain.run.corpus_audit import check_corpus
from meddino_pretrain.run.folder import PROBE_REFERENCE, RunFolder, open_run
from meddino_pretrain.run.guard import RunGuard
from meddino_pretrain.run.initialization import (
    Initialization,
    load_init_weights,
    load_stage_weights,
    read_init,
    resolve_start,
)
from meddino_pretrain.run.signals import StopRequest, stop_on_signals
from meddino_pretrain.schedules import Schedules
from meddino_pretrain.trainer import Trainer

logger = get_logger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What all stages of a run share.

    Attributes:
        run: The run's folder.
        corpus: What is learnt from.
        fixed: The slices that features are measured on.
        machine: Where it runs.
        peak: Operations a second that the machine reaches.
        stop: Whether a signal came.
        report: Of the run.
    """

    run: RunFolder
    corpus: Corpus
    fixed: FixedSlices
    machine: Machine
    peak: float
    stop: StopRequest
    report: RunReport


def run_pretraining(
    config: PretrainConfig,
    corpora: Path | str | Sequence[Path | str],
    out: Path,
    stages: Sequence[str] = (),
    caught: StopRequest | None = None,
) -> None:
    """Run the stages of a recipe, or go on where an earlier call stopped.

    Args:
        config: The recipe.
        corpora: A corpus of `meddino-curate`, or its URL; or several that are learnt from together.
        out: The run's folder.
        stages: Only these; all if empty.
        caught: Where signals are noted already; None catches them from here on.

    Raises:
        MedDINOError: Wrong input, told in one line.
        StoppedEarly: A signal came; everything is saved.
    """
    config.check_stages(stages)
    specs = check_views(config)
    with start_distributed() as place, nullcontext(caught) if caught else stop_on_signals() as stop:
        machine = find_machine(config.machine.device, config.machine.precision, place.local_rank)
        check_one_process_a_gpu(machine.identity)
        if not machine.is_accelerator:
            use_cpu_threads()
        plan_run(config, this_machine(config, world_size(), measured=False), stages)  # memory, before anything is begun
        corpus = open_corpora([corpora] if isinstance(corpora, Path | str) else corpora)
        check_corpus(corpus, config, largest_px(specs))
        with open_run(out, config, corpus) as run:
            # The same size in every stage, so that probes can be compared along the whole run.
            size_px = next(iter(specs.values())).main_px[0]
            fixed = fixed_slices(
                corpus, Intensities(config.contracts), config.probe.slices, size_px, pictured=config.probe.every_steps > 0
            )
            report = RunReport(run.folder, config)
            surroundings = Surroundings(run, corpus, fixed, machine, measure_peak(machine), stop, report)
            for name in stages or config.stages:
                stop.check(f"before {name}")
                run_stage(name, surroundings)
            if is_main() and config.saving.report:
                report.write(finished=True)


def run_stage(name: str, of: Surroundings) -> None:
    """Run one stage to its end; returns at once if it is there already, or is to be left out."""
    run, config, folder = of.run, of.run.config, of.run.stage_folder(name)
    begun = last_checkpoint(folder)
    if begun is not None and begun.step == config.stages[name].steps:
        logger.info("%s: done (%d steps)", name, begun.step)
        return
    start = None if begun is not None else _resolve_start(name, of)
    stage = _as_chosen(run, name)
    if stage is None:
        return
    if stage.snapshots_beyond:
        logger.info("%s: snapshot_steps %s lie beyond its %d steps and are not kept", name, stage.snapshots_beyond, stage.steps)
    corrupt = CorruptSamples(of.corpus.location, config.loader.max_corrupt, start.corrupt if start else corrupt_keys(begun))
    corrupt.check()
    guard = RunGuard(of.stop, corrupt, config.optimizer.max_bad_steps)
    seed = derive_seed(config.seed, "stage", name)
    method = _build_method(run, stage, seed, of.machine, start)
    optimizer = build_stage_optimizer(config.optimizer, method)
    state = {**method.networks(), "optimizer": OptimizerState("optimizer", optimizer, method.model), "guard": guard}
    meta = run.checkpoint_meta(name, method.export().config, exported_name(method))
    checkpoints = StageCheckpoints(
        folder,
        state=state,
        backbone=method.export(),
        meta=meta,
        saving=config.saving,
        steps=stage.steps,
        snapshot_steps=config.snapshots(name),
        corrupt=corrupt,
    )
    if begun is not None:
        checkpoints.resume(begun)
        logger.info("%s goes on after step %d of %d", name, begun.step, stage.steps)
    _check_room(folder, method)
    probe = FeatureProbe(of.fixed, config.probe, of.machine, run.folder / PROBE_REFERENCE)
    patch_px, on_accelerator = method.export().patch_size, of.machine.is_accelerator
    loader = build_loader(config, stage, seed, of.corpus, patch_px, on_accelerator, checkpoints.step, of.stop.came)
    with open_metrics(folder, checkpoints.step, config.saving, run.run_id) as metrics:
        labelled = LabelledProbe(folder, config.monitoring, method.export(), meta)
        monitor = Monitor(run.folder, name, config, probe, labelled, method, of.report, metrics)
        if begun is None:
            monitor.begin()
        later = later_steps(config, name)
        with show_progress(name, checkpoints.step, stage.steps, stage.global_batch, later) as progress:
            Trainer(
                method=method,
                optimizer=optimizer,
                schedules=Schedules(stage.schedule, stage.steps),
                steps=steps_of(loader, of.machine),
                checkpoints=checkpoints,
                guard=guard,
                metrics=metrics,
                progress=progress,
                monitor=monitor,
                speed=build_speed_meter(config, stage, of.machine, of.peak),
                machine=of.machine,
                clip_grad_norm=config.optimizer.clip_grad_norm,
            ).fit()
    barrier()


def exported_name(method: Method) -> str:
    """Return the name in a checkpoint of the backbone that a method exports."""
    exported = method.export()
    return next(name for name, backbone in backbones_in(method.networks()).items() if backbone is exported)


def _resolve_start(name: str, of: Surroundings) -> Initialization:
    start = resolve_start(of.run, name, of.corpus, of.machine)
    logger.info("%s starts from %s", name, start.message)
    of.run.record_start(name, start.record(of.run.folder, of.run.config.stages[name].steps))
    return start


def _as_chosen(run: RunFolder, name: str) -> StageConfig | None:
    """Return a stage's config after the choice of a kept backbone; None if the stage is left out."""
    stage = run.config.stages[name]
    method = stage.method.after_choice(run.chosen_action(name))
    if method is None:
        logger.info("%s is left out: patch quality did not fall", name)
        return None
    return stage.model_copy(update={"method": method})


def _build_method(run: RunFolder, stage: StageConfig, seed: int, machine: Machine, start: Initialization | None) -> Method:
    """Build the networks with the weights the stage starts from; a stage that goes on gets its own from the checkpoint."""
    method = build_method(run.config, stage, seed, machine)
    if start is not None and stage.starts_from is None:
        weights = read_init(run.config)
        if weights is not None:
            load_init_weights(weights, run.config.init.heads, method)
            run.record_parent(weights.parent)
    spread_method(method, run.config.machine, machine)
    if start is not None:
        load_stage_weights(start, method)
    return method


def _check_room(folder: Path, method: Method) -> None:
    # All networks, the trained one with two moments; once more, since the old one goes only after the new one stands.
    size = sum(p.numel() * p.element_size() for network in method.networks().values() for p in network.parameters())
    moments = 2 * sum(p.numel() * p.element_size() for p in method.model.parameters())
    check_free_space(folder, 2 * (size + moments), "two checkpoints")
