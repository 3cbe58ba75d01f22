"""`meddino-eval segment`, phase after phase: data, training of every (fold, seed), and the test cases, read once at the end."""

import time
from pathlib import Path
from typing import Any

from meddino.core.config import to_yaml
from meddino.core.files import atomic_write, write_text
from meddino.core.logging import get_logger
from meddino_evaluation.data.prepare import prepare_case
from meddino_evaluation.data.splits import Split
from meddino_evaluation.data.volumes import write_label_map
from meddino_evaluation.segmentation.bundle import write_bundle
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.experiment import Experiment, open_experiment, write_splits
from meddino_evaluation.segmentation.fitting import Fitting
from meddino_evaluation.segmentation.overlay import overlay_png
from meddino_evaluation.segmentation.postprocess import keep_largest
from meddino_evaluation.segmentation.prediction import predict, score
from meddino_evaluation.segmentation.report import picture_path
from meddino_evaluation.segmentation.results import TestRow, write_results
from meddino_evaluation.segmentation.trained import is_trained, load_network, weights_path

logger = get_logger(__name__)


def segment(config: SegmentConfig, model: str, data: Path, out: Path, corpus: Path | None = None) -> dict[str, Any]:
    """Train, then test.

    Args:
        config: Settings.
        model: See `load_encoder`.
        data: Folder of the data set.
        out: Folder of the results; what an earlier call with the same settings has trained there is taken up.
        corpus: Corpus the model was pretrained on, to look for test volumes in it.

    Returns:
        The content of metrics.json.

    Raises:
        MedDINOError: Anything the user can mend.
    """
    started = time.monotonic()
    experiment = open_experiment(config, model, data, corpus)
    write_text(out / "config.yaml", to_yaml(config))
    write_splits(experiment, out)
    train_all(experiment, out)
    write_bundle(experiment, out)
    trained = time.monotonic()
    experiment.forget()
    rows = test_all(experiment, out)
    seconds = {"train": trained - started, "test": time.monotonic() - trained}
    return write_results(experiment, rows, out, seconds)


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


def test_all(experiment: Experiment, out: Path) -> list[TestRow]:
    """Read each test case once, predict it with the networks of all seeds, write and measure the predictions."""
    rows: list[TestRow] = []
    scheme = experiment.dataset.labels
    for split in experiment.splits:
        source = experiment.fold_source(split)
        networks = [experiment.network(source, seed) for seed in experiment.config.seeds]
        components = [
            load_network(network, weights_path(out, split.fold, seed))
            for network, seed in zip(networks, experiment.config.seeds, strict=True)
        ]
        experiment.forget()
        rule = experiment.grid_rule(split)
        for name in split.test:
            entry = experiment.dataset.case(name)
            case = prepare_case(experiment.dataset, entry, experiment.channels, rule, with_label=False)
            experiment.check_leakage(case)
            reference = experiment.dataset.read_label(entry, case.source)
            predictions = predict(experiment, case, networks)
            for seed, raw, keep in zip(experiment.config.seeds, predictions, components, strict=True):
                labels = keep_largest(raw, scheme, keep)
                write_label_map(prediction_path(out, split, seed, name), labels, case.source)
                found = score(experiment, case, labels, reference, experiment.config.metrics.surface)
                rows += [TestRow(split.fold, seed, entry.patient, entry.site, row) for row in found]
            picture = overlay_png(case, keep_largest(predictions[0], scheme, components[0]), reference, scheme)
            with atomic_write(picture_path(out, split.fold, name)) as stream:
                stream.write(picture)
            logger.info("fold %d: case %s predicted and measured", split.fold, name)
    return rows


def prediction_path(out: Path, split: Split, seed: int, case: str) -> Path:
    """Return where the prediction of a case lies."""
    return out / "predictions" / f"fold-{split.fold}_seed-{seed}" / f"{case}.nii.gz"
