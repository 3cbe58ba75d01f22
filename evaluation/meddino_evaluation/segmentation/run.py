"""`meddino-eval segment`, phase after phase: data, training of every (fold, seed), and the test cases, read once at the end."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from meddino.core.config import to_yaml
from meddino.core.errors import CheckpointError
from meddino.core.files import atomic_write, write_text
from meddino.core.logging import get_logger
from meddino_evaluation.data.prepare import PreparedCase, prepare_case
from meddino_evaluation.data.splits import Split
from meddino_evaluation.data.volumes import write_label_map
from meddino_evaluation.metrics.label_metrics import LabelRow, mean_over_cases, score_case
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.experiment import Experiment, open_experiment, write_splits
from meddino_evaluation.segmentation.inference import predict_case
from meddino_evaluation.segmentation.network import EncoderSource, SegmentationNetwork, state_hash
from meddino_evaluation.segmentation.overlay import overlay_png
from meddino_evaluation.segmentation.report import picture_path
from meddino_evaluation.segmentation.results import TestRow, write_results
from meddino_evaluation.segmentation.samples import CropSampler, choose_slices
from meddino_evaluation.segmentation.training import StepRecord, TokenCache, Trainer

logger = get_logger(__name__)


def segment(config: SegmentConfig, model: str, data: Path, out: Path) -> dict[str, Any]:
    """Train, then test.

    Args:
        config: Settings.
        model: See `load_encoder`.
        data: Folder of the data set.
        out: Folder of the results; what an earlier call with the same settings has trained there is taken up.

    Returns:
        The content of metrics.json.

    Raises:
        MedDINOError: Anything the user can mend.
    """
    started = time.monotonic()
    experiment = open_experiment(config, model, data)
    write_text(out / "config.yaml", to_yaml(config))
    write_splits(experiment, out)
    train_all(experiment, out)
    trained = time.monotonic()
    experiment.forget()
    rows = test_all(experiment, out)
    seconds = {"train": trained - started, "test": time.monotonic() - trained}
    return write_results(experiment, rows, out, seconds)


def train_all(experiment: Experiment, out: Path) -> None:
    """Train every fold and seed whose weights are not there yet."""
    identity = experiment.identity
    for split in experiment.splits:
        waiting = [seed for seed in experiment.config.seeds if not _is_trained(weights_path(out, split, seed), identity)]
        if not waiting:
            logger.info("fold %d: all %d seeds are trained already", split.fold, len(experiment.config.seeds))
            continue
        source = experiment.fold_source(split)
        cache: TokenCache | None = None
        for seed in waiting:
            network = experiment.network(source, seed)
            if experiment.config.encoder.mode == "frozen" and experiment.config.training.crops == "grid":
                cache = cache or TokenCache(network, experiment.machine)
            train_one(experiment, split, seed, network, cache, out)
            save_network(network, weights_path(out, split, seed), identity)


def train_one(
    experiment: Experiment, split: Split, seed: int, network: SegmentationNetwork, cache: TokenCache | None, out: Path
) -> None:
    """Train one network and make sure that exactly what should learn has learned."""
    config = experiment.config
    rule = experiment.grid_rule(split)
    cases = [experiment.prepare(name, rule) for name in experiment.training_cases(split, seed)]
    slices = choose_slices(cases, config.labels, seed)
    # Outside a slice is air in intensities that are not normalised yet.
    air = network.contract.hu_min
    sampler = CropSampler(cases, slices, config.training, config.data.neighbour_slices, air, seed)
    trainer = Trainer(network, sampler, experiment.dataset.labels, config.training, experiment.machine, cache, seed)
    before = state_hash(network.backbone)
    logger.info(
        "fold %d, seed %d: %d cases, %d labelled slices, %d steps",
        split.fold,
        seed,
        len(cases),
        len(slices),
        config.training.steps,
    )
    keeper = BestWeights(experiment, split, network) if config.training.selection == "best_val" else None
    with atomic_write(out / "logs" / f"fold-{split.fold}_seed-{seed}.jsonl", "w") as stream:

        def on_step(record: StepRecord) -> None:
            last = record.step + 1 == config.training.steps
            if record.step % config.training.log_every_steps == 0 or last:
                stream.write(json.dumps(asdict(record)) + "\n")
                logger.info(
                    "fold %d, seed %d, step %d/%d: loss %.4f",
                    split.fold,
                    seed,
                    record.step + 1,
                    config.training.steps,
                    record.loss,
                )
            if keeper is not None and ((record.step + 1) % config.training.val_every_steps == 0 or last):
                dice = keeper.look(record.step + 1)
                stream.write(json.dumps({"step": record.step, "val_dice": dice}) + "\n")

        trainer.fit(on_step)
    if keeper is not None:
        keeper.restore()
    moved = state_hash(network.backbone) != before
    if moved == (config.encoder.mode == "frozen"):
        raise RuntimeError(
            f"encoder.mode={config.encoder.mode}, but the encoder's weights {'moved' if moved else 'did not move'}"
        )


class BestWeights:
    """Keeps what learned of the network at its best validation Dice.

    Args:
        experiment: Gives the validation cases.
        split: Fold.
        network: Is put back to evaluation while looked at.
    """

    def __init__(self, experiment: Experiment, split: Split, network: SegmentationNetwork) -> None:
        self.experiment, self.split, self.network = experiment, split, network
        self.best_dice: float | None = None
        self.best: dict[str, Tensor] | None = None

    def look(self, step: int) -> float | None:
        """Measure the validation cases; None if no label is defined there."""
        experiment = self.experiment
        rule = experiment.grid_rule(self.split)
        rows = []
        for name in self.split.val:
            case = experiment.prepare(name, rule)
            reference = experiment.dataset.read_label(experiment.dataset.case(name), case.source)
            rows += [row.values() for row in score(experiment, case, predict(experiment, case, [self.network])[0], reference)]
        self.network.train()
        dice, count = mean_over_cases(rows, "dice")
        if not count:
            return None
        logger.info("fold %d, step %d: validation Dice %.4f on %d cases", self.split.fold, step, dice, count)
        if self.best_dice is None or dice > self.best_dice:
            self.best_dice, self.best = (
                dice,
                {key: value.detach().clone() for key, value in learned_state(self.network).items()},
            )
        return dice

    def restore(self) -> None:
        """Put the best weights back."""
        if self.best is not None:
            self.network.load_state_dict(self.best, strict=False)


def test_all(experiment: Experiment, out: Path) -> list[TestRow]:
    """Read each test case once, predict it with the networks of all seeds, write and measure the predictions."""
    rows: list[TestRow] = []
    for split in experiment.splits:
        source = experiment.fold_source(split)
        networks = [load_network(experiment, source, split, seed, out) for seed in experiment.config.seeds]
        experiment.forget()
        rule = experiment.grid_rule(split)
        for name in split.test:
            entry = experiment.dataset.case(name)
            case = prepare_case(experiment.dataset, entry, experiment.channels, rule, with_label=False)
            reference = experiment.dataset.read_label(entry, case.source)
            predictions = predict(experiment, case, networks)
            for seed, labels in zip(experiment.config.seeds, predictions, strict=True):
                path = prediction_path(out, split, seed, name)
                write_label_map(path, labels, case.source)
                found = score(experiment, case, labels, reference)
                rows += [TestRow(split.fold, seed, entry.patient, entry.site, row) for row in found]
            picture = overlay_png(case, predictions[0], reference, experiment.dataset.labels)
            with atomic_write(picture_path(out, split.fold, name)) as stream:
                stream.write(picture)
            logger.info("fold %d: case %s predicted and measured", split.fold, name)
    return rows


def predict(experiment: Experiment, case: PreparedCase, networks: list[SegmentationNetwork]) -> list[NDArray[Any]]:
    """Predict one case with several networks of one encoder contract; a frozen encoder runs once for all of them."""
    config, first = experiment.config, networks[0]
    for network in networks:
        network.eval()

    def forward(images: Tensor) -> Tensor:
        with experiment.machine.autocast():
            if first.trains_encoder:
                return torch.cat([network(images).float() for network in networks], dim=1)
            tokens = first.tokens(images)
            return torch.cat([network.head(tokens, images).float() for network in networks], dim=1)

    with torch.no_grad():
        return list(
            predict_case(
                case,
                forward,
                len(networks),
                first.contract,
                experiment.dataset.labels,
                experiment.window(),
                config.data.neighbour_slices,
                experiment.machine,
            )
        )


def score(experiment: Experiment, case: PreparedCase, labels: NDArray[Any], reference: NDArray[np.int32]) -> list[LabelRow]:
    """Measure a prediction against the reference, both on the source's own voxels."""
    metrics = experiment.config.metrics
    return score_case(
        case.name, labels, reference, experiment.dataset.labels, case.source.spacing_mm, metrics.tolerance_mm, metrics.surface
    )


def weights_path(out: Path, split: Split, seed: int) -> Path:
    """Return where the weights of a fold and seed lie."""
    return out / "weights" / f"fold-{split.fold}_seed-{seed}.safetensors"


def prediction_path(out: Path, split: Split, seed: int, case: str) -> Path:
    """Return where the prediction of a case lies."""
    return out / "predictions" / f"fold-{split.fold}_seed-{seed}" / f"{case}.nii.gz"


def learned_state(network: SegmentationNetwork) -> dict[str, Tensor]:
    """Return what training changed: the head, and the encoder where it learns."""
    return {key: value for key, value in network.state_dict().items() if network.trains_encoder or key.startswith("head.")}


def save_network(network: SegmentationNetwork, path: Path, identity: str) -> None:
    """Write what learned, under the identity of the run it belongs to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in learned_state(network).items()}
    with atomic_write(path) as stream:
        stream.write(save(tensors, metadata={"identity": identity}))


def load_network(experiment: Experiment, source: EncoderSource, split: Split, seed: int, out: Path) -> SegmentationNetwork:
    """Build the network of a fold and seed and fill in what it learned.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    network = experiment.network(source, seed)
    path = weights_path(out, split, seed)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}; delete it and run the same command again") from error
    network.load_state_dict(tensors, strict=False)
    lacking = learned_state(network).keys() - tensors.keys()
    if lacking:
        raise CheckpointError(f"{path} lacks {sorted(lacking)[:3]}; delete it and run the same command again")
    return network.eval()


def _is_trained(path: Path, identity: str) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("identity") == identity)
    except (OSError, SafetensorError):
        return False
