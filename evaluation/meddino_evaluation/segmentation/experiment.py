"""What all phases of a segmentation run share: data, encoder, machine, splits, and how cases are prepared."""

import functools
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import meddino
from meddino.core.device import Machine, find_machine, use_cpu_threads
from meddino.core.errors import ConfigError
from meddino.core.files import canonical_json, write_json
from meddino.core.logging import get_logger
from meddino_evaluation.data.dataset import LabelledDataset, check_grids, with_patients
from meddino_evaluation.data.fingerprint import foreground_contract, median_plane_spacing
from meddino_evaluation.data.layouts import open_dataset
from meddino_evaluation.data.leakage import LeakageCheck
from meddino_evaluation.data.prepare import GridRule, PreparedCase
from meddino_evaluation.data.prepared_cache import prepare_cached
from meddino_evaluation.data.splits import (
    SPLITS_FILE,
    Split,
    check_twins,
    choose_split,
    few_cases,
    left_out,
    make_folds,
    of_folds,
    read_folds,
)
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.inference.sliding_window import SlidingWindow
from meddino_evaluation.segmentation.networks.build import HeadRequest, build_network, head_request
from meddino_evaluation.segmentation.networks.encoders import load_encoder, widened
from meddino_evaluation.segmentation.networks.network import EncoderSource, SegmentationNetwork

logger = get_logger(__name__)


@dataclass
class Experiment:
    """One model on one data set.

    Attributes:
        config: Settings.
        dataset: Cases and labels.
        source: The model.
        machine: Device and arithmetic.
        splits: Folds that are run.
        leakage: Knows the volumes the model was pretrained on, where they are known.
    """

    config: SegmentConfig
    dataset: LabelledDataset
    source: EncoderSource
    machine: Machine
    splits: tuple[Split, ...]
    leakage: LeakageCheck
    _prepared: dict[tuple[str, GridRule], PreparedCase] = field(default_factory=dict, repr=False)
    _request: HeadRequest | None = field(default=None, repr=False)

    @property
    def channels(self) -> tuple[int, ...]:
        """Image channels that are read; a picture's colours are one."""
        if self.dataset.flat:
            return tuple(range(len(self.dataset.channel_names)))
        return (0,) if self.config.data.channels == "first" else tuple(range(len(self.dataset.channel_names)))

    @property
    def cache(self) -> Path | None:
        """Folder of prepared cases that runs share, or None."""
        return None if self.config.data.cache is None else Path(self.config.data.cache)

    @property
    def input_channels(self) -> int:
        """Channels of the model input."""
        entering = len(self.channels) * (2 * self.config.data.neighbour_slices + 1)
        return entering if entering > 1 else self.source.contract.channels

    def identity(self, split: Split) -> str:
        """Return a hash of everything that a fold's networks depend on; what was trained under another one is never taken up.

        Who trains and who selects is in it, and whose cases they are: after another division of the patients an old network
        would be tested on those that it learnt from.
        """
        cases = [self.dataset.case(name) for name in (*split.train, *split.val)]
        parts = {
            "config": self.config.model_dump(
                mode="json",
                exclude={
                    "seeds": True,
                    "splits": True,
                    "metrics": True,
                    "inference": {"step", "gaussian", "mirror", "batch_size"},
                    "data": {"cache"},
                    "training": {"map_cache_mib"},
                },
            ),
            "model": self.source.model_hash,
            "fold": split.number,
            "train": split.train,
            "val": split.val,
            "patients": [case.patient for case in cases],
            "data": self.dataset.data_hash(cases),
            "labels": repr(self.dataset.labels),
            "modality": self.dataset.modality,
            "contract": repr(self.source.contract),
            "version": meddino.__version__,
        }
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    def grid_rule(self, split: Split) -> GridRule:
        """Return the in-plane grid, for a rule that asks for it from the training cases of the fold."""
        data = self.config.data
        if data.resample == "plan":
            median = median_plane_spacing([self.dataset.geometry(self.dataset.case(name)) for name in split.train])
            return GridRule(spacing_mm=median * data.plan_px / self.config.training.crop_px)
        if data.resample == "spacing":
            return GridRule(spacing_mm=data.spacing_mm)
        return GridRule(size_px=data.size_px) if data.resample == "size" else GridRule()

    def prepare(self, name: str, rule: GridRule) -> PreparedCase:
        """Read and prepare a case, once for all folds and seeds."""
        key = (name, rule)
        if key not in self._prepared:
            self._prepared[key] = prepare_cached(self.dataset, self.dataset.case(name), self.channels, rule, self.cache)
        return self._prepared[key]

    def forget(self) -> None:
        """Let go of the prepared cases."""
        self._prepared.clear()

    def training_cases(self, split: Split, seed: int) -> tuple[str, ...]:
        """Return the cases that a seed may learn from."""
        few = self.config.labels
        return few_cases(split.train, self.dataset.cases, few.train_cases, few.train_fraction, seed)

    def fold_source(self, split: Split) -> EncoderSource:
        """Return the model with the input contract of a fold: its own, or that of the training cases."""
        if self.config.data.intensity == "contract":
            return self.source
        rule = self.grid_rule(split)
        cases = [self.prepare(name, rule) for name in split.train]
        found = foreground_contract(cases, self.source.contract.channels, self.dataset.modality)
        return replace(self.source, contract=replace(self.source.contract, own=found))

    def network(self, source: EncoderSource, seed: int) -> SegmentationNetwork:
        """Build the network of a seed, on the machine; a learning encoder is a copy of its own."""
        config = self.config
        if self._request is None:
            self._request = head_request(
                source.backbone, config.encoder, self.input_channels, config.training.crop_px, self.dataset.labels.num_outputs
            )
        network = build_network(source, config.encoder, config.head.name, self._request, seed)
        return network.to(self.machine.device)


def sliding_window(config: SegmentConfig) -> SlidingWindow:
    """Return the sliding window of a config."""
    inference = config.inference
    return SlidingWindow(config.training.crop_px, inference.step, inference.gaussian, inference.mirror, inference.batch_size)


def open_experiment(config: SegmentConfig, model: str, data: Path, corpus: Path | str | None = None) -> Experiment:
    """Read and check everything before anything long starts.

    Raises:
        MedDINOError: The data set, the model, the splits or their combination is wrong.
    """
    use_cpu_threads()
    machine = find_machine(config.device, config.precision)
    dataset = open_labels(data, config)
    source = load_encoder(model, config.encoder.random_seed)
    source = replace(source, contract=replace(source.contract, given=dataset.modality))
    mismatch = source.contract.mismatch(dataset.modality, f"model {source.name} on {dataset.name}")
    if mismatch:
        logger.warning("%s; they are scaled to its range", mismatch)
    check_fit(config, source)
    check_grids(dataset)
    leakage = LeakageCheck(source.lineage, corpus, source.name)
    experiment = Experiment(config, dataset, source, machine, choose_splits(config, dataset), leakage)
    _check_neighbours(experiment)
    experiment.source = widened(source, experiment.input_channels)
    source.backbone.to(machine.device)
    return experiment


def open_labels(data: Path, config: SegmentConfig) -> LabelledDataset:
    """Open a data set with its patients and the labels that are asked for."""
    dataset = with_patients(open_dataset(data), config.data.patient_pattern)
    if config.data.modality != "auto":
        dataset = replace(dataset, modality=config.data.modality)
    return replace(dataset, labels=dataset.labels.only(config.labels.use)) if config.labels.use else dataset


def check_fit(config: SegmentConfig, source: EncoderSource) -> None:
    """Refuse settings that the model cannot follow.

    Raises:
        ConfigError: Says which and what is possible.
    """
    source.contract.check_size(config.training.crop_px, f"model {source.name} (training.crop_px)")
    blocks = len(source.backbone.stages())
    if config.encoder.taps > blocks > 0:
        raise ConfigError(f"encoder.taps is {config.encoder.taps}; this model has {blocks} blocks")
    if config.encoder.mode != "frozen" and not blocks:
        raise ConfigError(
            f"encoder.mode={config.encoder.mode}: --model none has nothing that could learn; use encoder.mode=frozen"
        )


def _check_neighbours(experiment: Experiment) -> None:
    """Refuse slices beside each other as channels that the model does not have: its colours would be repeated over them."""
    source, slices, entering = experiment.source, 2 * experiment.config.data.neighbour_slices + 1, experiment.input_channels
    if slices > 1 and entering != source.contract.channels:
        raise ConfigError(
            f"{len(experiment.channels)} image channels x {slices} slices are {entering} input channels, but model "
            f"{source.name} takes 1 (repeated) or {source.contract.channels}; see data.channels and data.neighbour_slices"
        )


def choose_splits(config: SegmentConfig, dataset: LabelledDataset) -> tuple[Split, ...]:
    """Read or make the folds and return those that are run.

    Raises:
        ConfigError: A fold is missing or empty, or patients are on two sides.
    """
    own = dataset.root / SPLITS_FILE
    path = Path(config.splits.file) if config.splits.file is not None else own if own.is_file() else None
    if path is not None and not path.is_file():
        raise ConfigError(f"splits.file {path}: no such file")
    patients = len({case.patient for case in dataset.cases})
    count = min(config.splits.folds, max(2, patients))
    if not path and count < config.splits.folds:
        _tell(f"splits.folds is {config.splits.folds}, and there are {patients} patients: {count} folds")
    folds = read_folds(path) if path else make_folds(dataset.cases, count, config.splits.seed)
    fraction = config.splits.val_fraction if config.training.selection == "best_val" else 0.0
    splits = tuple(
        choose_split(dataset.cases, dataset.test_cases, folds, fold, fraction, config.splits.seed)
        for fold in config.splits.run_folds
    )
    hashes = {case.name: [dataset.file_hash(path) for path in case.images] for case in dataset.all_cases}
    lost = left_out(dataset.cases, of_folds(folds))
    if lost:
        _tell(f"{path}: {lost}")
    source = f"the file {path}" if path else f"{count} folds drawn by patient, seed {config.splits.seed}"
    source += f" ({lost})" if lost else ""
    part = "its own test part (imagesTs)" if dataset.test_cases else "the fold's held-out cases"
    splits = tuple(replace(split, origin=f"{source}; the test is {part}") for split in splits)
    for split in splits:
        check_twins(split, hashes, f"fold {split.number}")
    if config.training.selection == "best_val":
        empty = [split.number for split in splits if not split.val]
        if empty:
            raise ConfigError(
                f"training.selection=best_val needs validation cases, and fold {empty[0]} has none; see splits.val_fraction"
            )
    return splits


@functools.cache
def _tell(what: str) -> None:
    """Said once a process, however many models are compared."""
    logger.warning("%s", what)


def write_splits(experiment: Experiment, out: Path) -> None:
    """Write the folds as nnU-Net's splits_final.json and, beside it, what each part of this run holds."""
    folds = [{"train": [*split.train, *split.val], "val": list(split.test)} for split in experiment.splits]
    write_json(out / SPLITS_FILE, folds)
    parts: list[dict[str, Any]] = [
        {
            "fold": split.number,
            "origin": split.origin,
            "train": list(split.train),
            "val": list(split.val),
            "test": list(split.test),
            "labelled": {str(seed): list(experiment.training_cases(split, seed)) for seed in experiment.config.seeds},
        }
        for split in experiment.splits
    ]
    write_json(out / "splits.json", parts)
