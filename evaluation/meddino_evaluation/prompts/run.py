"""`meddino-eval prompt`: a decoder is trained for each fold and seed, then test cases are read once and measured."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from meddino.core.config import load_config
from meddino.core.errors import VolumeError
from meddino.core.files import atomic_write, write_json
from meddino.core.logging import get_logger
from meddino.volumes.writing import write_label_map
from meddino_evaluation.adaptation.fitting import Clock, is_of, load_state
from meddino_evaluation.data.prepare import GridRule, prepare_case
from meddino_evaluation.data.run_folder import refuse_files_of_others, write_settings
from meddino_evaluation.data.splits import Split
from meddino_evaluation.metrics.label_metrics import score_case
from meddino_evaluation.prompts.config import BUNDLE_FILE, PromptConfig
from meddino_evaluation.prompts.fitting import fit_decoder, run_identity
from meddino_evaluation.prompts.masks import predict_case
from meddino_evaluation.prompts.network import PromptNetwork, check_model
from meddino_evaluation.segmentation.experiment import Experiment, open_experiment, write_splits
from meddino_evaluation.segmentation.inference.held_out import HeldOutRow, HeldOutSet, open_held_out_set, prediction_path
from meddino_evaluation.segmentation.overlay import overlay_png
from meddino_evaluation.segmentation.report import picture_path
from meddino_evaluation.segmentation.results import RESULTS, write_results
from meddino_evaluation.segmentation.run import NO_TESTS
from meddino_evaluation.segmentation.training.fitting import weights_path
from meddino_evaluation.segmentation.training.map_cache import MapCache
from meddino_evaluation.tasks.definition import TaskDefinition
from meddino_evaluation.tasks.prepare import prepare_task
from meddino_evaluation.tasks.run import add_headline

logger = get_logger(__name__)


def run_task(task: TaskDefinition, model: str, root: Path, out: Path, overrides: Sequence[str] = ()) -> None:
    """Run a task of kind prompts (or the data of a segmentation from prompts); see `tasks.run.run_task`."""
    prepared = prepare_task(task, root, out / "data")
    config = load_config(PromptConfig, ["prompt"], [*prepared.overrides, *overrides], kind="evaluation")
    add_headline(task, prompt(config, model, prepared.data, out, tests=prepared.tests), out)


def prompt(
    config: PromptConfig,
    model: str,
    data: Path,
    out: Path,
    corpus: Path | str | None = None,
    tests: Mapping[str, Path] = NO_TESTS,
) -> dict[str, Any]:
    """Train the decoders, then test them; arguments and result as `segment` has them.

    Raises:
        MedDINOError: Anything the user can mend.
    """
    started = time.monotonic()
    refuse_files_of_others(out, RESULTS)
    experiment = open_experiment(config.as_segmentation(), model, data, corpus)
    check_model(experiment.source.backbone, config.size_px)
    sets = [open_held_out_set(experiment, name, root, out, corpus) for name, root in tests.items()]
    write_settings(out, config)
    write_splits(experiment, out)
    _train_all(experiment, config, out)
    _write_bundle(experiment, out)
    trained = time.monotonic()
    own = HeldOutSet("", experiment.dataset, out, experiment.leakage)
    for split in experiment.splits:
        networks = [_load(experiment, config, out, split, seed) for seed in config.seeds]
        experiment.forget()
        for tested in (own, *sets):
            _evaluate(experiment, config, split, networks, tested)
    for tested in (own, *sets):
        if not tested.rows:
            reasons = next(iter(tested.failed.values()), "it holds none")
            raise VolumeError(f"no case of test set {tested.name or experiment.dataset.name} could be tested: {reasons}")
    seconds = {"train": trained - started, "test": time.monotonic() - trained}
    what = f"prompts ({config.prompts.kind}), mask decoder trained for {config.training.steps} steps, everything else held"
    return write_results(experiment, own, sets, seconds, what, {"prompts": config.model_dump(mode="json")})


def build(experiment: Experiment, config: PromptConfig, seed: int) -> PromptNetwork:
    """Build the network of a seed, on the machine."""
    source = experiment.source
    network = PromptNetwork(source.backbone, source.contract, config.size_px, config.decoder, seed)
    return network.to(experiment.machine.device)


def _train_all(experiment: Experiment, config: PromptConfig, out: Path) -> None:
    identities = {split: run_identity(experiment, config, split) for split in experiment.splits}
    waiting = {
        split: [seed for seed in config.seeds if not is_of(weights_path(out, split.number, seed), identity)]
        for split, identity in identities.items()
    }
    trainings = sum(map(len, waiting.values()))
    logger.info("plan: %s: %d decoders of %d steps", experiment.source.name, trainings, config.training.steps)
    clock = Clock(trainings * config.training.steps)
    cache: MapCache | None = None
    for split, seeds in waiting.items():
        for seed in seeds:
            network = build(experiment, config, seed)
            # The held encoder makes the same of a slice for every seed and fold.
            cache = cache or MapCache(network, experiment.machine, config.training.map_cache_mib)
            fit_decoder(experiment, config, network, cache, split, seed, out, identities[split], clock)


def _load(experiment: Experiment, config: PromptConfig, out: Path, split: Split, seed: int) -> PromptNetwork:
    network = build(experiment, config, seed)
    load_state(network, weights_path(out, split.number, seed), network.own_state())
    return network.eval()


def _evaluate(
    experiment: Experiment, config: PromptConfig, split: Split, networks: Sequence[PromptNetwork], tested: HeldOutSet
) -> None:
    rule, dataset, metrics = GridRule(size_px=config.size_px), tested.dataset, experiment.config.metrics
    for name in tested.cases(split):
        entry = dataset.case(name)
        try:
            # Prompts are drawn from the reference, so it is read with the image.
            case = prepare_case(dataset, entry, experiment.channels, rule)
            reference = dataset.read_label(entry, case.source)
        except VolumeError as error:
            logger.warning("fold %d: case %s is left out: %s", split.number, name, error)
            tested.failed[name] = str(error)
            continue
        tested.leakage.look(name, case.content_hash)
        cache = MapCache(networks[0], experiment.machine, config.training.map_cache_mib)
        for place, (seed, network) in enumerate(zip(config.seeds, networks, strict=True)):
            with torch.no_grad(), experiment.machine.autocast():
                labels = predict_case(network, cache, case, dataset.labels, config.prompts, config.data.neighbour_slices)
            write_label_map(prediction_path(tested.out, split, seed, name), labels, case.source)
            measured = dataset.labels, case.source.spacing_mm, metrics.tolerance_mm, metrics.surface, dataset.flat
            rows = score_case(name, labels, reference, *measured)
            tested.rows += [HeldOutRow(split.number, seed, entry.patient, entry.site, row) for row in rows]
            if not place:
                with atomic_write(picture_path(tested.out, split.number, name)) as stream:
                    stream.write(overlay_png(case, labels, reference, dataset.labels))
        logger.info("fold %d: case %s predicted and measured", split.number, name)


def _write_bundle(experiment: Experiment, out: Path) -> None:
    source, dataset = experiment.source, experiment.dataset
    content = {
        "format": "meddino-prompt-network",
        "model": str(Path(source.name).absolute()) if Path(source.name).exists() else source.name,
        "model_hash": source.model_hash,
        "labels": asdict(dataset.labels),
        "modality": dataset.modality,
        "flat": dataset.flat,
        "channels": len(experiment.channels),
        "input_channels": experiment.input_channels,
        "folds": [split.number for split in experiment.splits],
    }
    write_json(out / BUNDLE_FILE, content)
