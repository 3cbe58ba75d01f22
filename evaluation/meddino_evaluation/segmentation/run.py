"""`meddino-eval segment`, phase after phase: data, training of every (fold, seed), and the test cases, read once at the end."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from meddino.core.config import to_yaml
from meddino.core.files import write_text
from meddino.core.logging import get_logger
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.experiment import Experiment, open_experiment, write_splits
from meddino_evaluation.segmentation.inference.bundle import write_bundle
from meddino_evaluation.segmentation.inference.held_out import HeldOutSet, evaluate_all, open_held_out_set
from meddino_evaluation.segmentation.results import write_results
from meddino_evaluation.segmentation.training.fitting import Fitting
from meddino_evaluation.segmentation.training.trained import is_trained, weights_path

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
    experiment = open_experiment(config, model, data, corpus)
    sets = [open_held_out_set(experiment, name, root, out, corpus) for name, root in tests.items()]
    write_text(out / "config.yaml", to_yaml(config))
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
    identity = experiment.identity
    for split in experiment.splits:
        seeds = experiment.config.seeds
        waiting = [seed for seed in seeds if not is_trained(weights_path(out, split.fold, seed), identity)]
        if not waiting:
            logger.info("fold %d: all %d seeds are trained already", split.fold, len(seeds))
            continue
        fitting = Fitting(experiment, split, out, identity)
        lr_head = fitting.choose_lr(seeds[0])
        for seed in waiting:
            fitting.fit_seed(seed, lr_head)
