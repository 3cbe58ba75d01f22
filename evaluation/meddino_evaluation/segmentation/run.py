"""`meddino-eval segment`, phase after phase: data, training of every (fold, seed), and the test cases, read once at the end."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from meddino.core.logging import get_logger
from meddino_evaluation.adaptation.fitting import Clock, is_of
from meddino_evaluation.data.run_folder import refuse_files_of_others, write_settings
from meddino_evaluation.data.splits import Split
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.experiment import Experiment, open_experiment, write_splits
from meddino_evaluation.segmentation.inference.bundle import write_bundle
from meddino_evaluation.segmentation.inference.held_out import HeldOutSet, evaluate_all, open_held_out_set
from meddino_evaluation.segmentation.results import RESULTS, write_results
from meddino_evaluation.segmentation.training.fitting import Fitting, weights_path

logger = get_logger(__name__)

NO_TESTS: Mapping[str, Path] = MappingProxyType({})


def segment(
    config: SegmentConfig,
    model: str,
    data: Path,
    out: Path,
    corpus: Path | str | None = None,
    tests: Mapping[str, Path] = NO_TESTS,
) -> dict[str, Any]:
    """Train, then test.

    Args:
        config: Settings.
        model: See `load_encoder`.
        data: Folder of the data set.
        out: Folder of the results; what an earlier call with the same settings has trained there is taken up.
        corpus: Corpus the model was pretrained on, to look for test volumes in it.
        tests: Data sets from elsewhere, by name, on which every network is tested too.

    Returns:
        The content of metrics.json.

    Raises:
        MedDINOError: Anything the user can mend.
    """
    started = time.monotonic()
    refuse_files_of_others(out, RESULTS)
    experiment = open_experiment(config, model, data, corpus)
    sets = [open_held_out_set(experiment, name, root, out, corpus) for name, root in tests.items()]
    write_settings(out, config)
    write_splits(experiment, out)
    train_all(experiment, out)
    write_bundle(experiment, out)
    trained = time.monotonic()
    experiment.forget()
    own = HeldOutSet("", experiment.dataset, out, experiment.leakage)
    evaluate_all(experiment, [own, *sets], out)
    seconds = {"train": trained - started, "test": time.monotonic() - trained}
    return write_results(experiment, own, sets, seconds)


def train_all(experiment: Experiment, out: Path) -> None:
    """Train every fold and seed whose weights are not there yet."""
    config = experiment.config
    identities = {split: experiment.identity(split) for split in experiment.splits}
    waiting_by_fold = {
        split: [seed for seed in config.seeds if not is_of(weights_path(out, split.number, seed), identity)]
        for split, identity in identities.items()
    }
    clock = Clock(plan(experiment, waiting_by_fold))
    for split, waiting in waiting_by_fold.items():
        seeds = config.seeds
        if not waiting:
            logger.info("fold %d: all %d seeds are trained already", split.number, len(seeds))
            continue
        fitting = Fitting(experiment, split, out, identities[split], clock)
        lr_head = fitting.choose_lr(seeds[0])
        for seed in waiting:
            fitting.fit_seed(seed, lr_head)


def plan(experiment: Experiment, waiting: Mapping[Split, Sequence[int]]) -> int:
    """Say what is about to be trained, and return its optimizer steps."""
    config = experiment.config
    trainings = sum(map(len, waiting.values())) + len(config.training.lr_head_grid) * sum(map(bool, waiting.values()))
    for split in waiting:
        counts = len(split.train), len(split.val), len(split.test)
        logger.info("plan: fold %d trains on %d cases, selects on %d, tests on %d", split.number, *counts)
    steps, device = config.training.steps, experiment.machine.device
    what = (experiment.source.name, config.encoder.mode, config.head.name)
    logger.info("plan: %s, encoder %s, head %s: %d trainings of %d steps on %s", *what, trainings, steps, device)
    return trainings * steps
