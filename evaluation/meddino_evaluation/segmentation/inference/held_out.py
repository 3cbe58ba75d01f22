"""The test phase: each test case is read once, predicted by the networks of all seeds, written and measured.

A volume that cannot be read is named and the others go on. Test sets from elsewhere (another hospital, another scanner) are
predicted in the same phase by the same networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from meddino.core.errors import ConfigError, VolumeError
from meddino.core.files import atomic_write
from meddino.core.logging import get_logger
from meddino.volumes.writing import write_label_map
from meddino_evaluation.data.case import LabelMapCase
from meddino_evaluation.data.dataset import LabelledDataset, check_grids, with_patients
from meddino_evaluation.data.labels import LabelScheme
from meddino_evaluation.data.layouts import open_dataset
from meddino_evaluation.data.leakage import LeakageCheck
from meddino_evaluation.data.prepare import GridRule, prepare_case
from meddino_evaluation.data.splits import Split
from meddino_evaluation.metrics.label_metrics import LabelRow, score_case
from meddino_evaluation.segmentation.experiment import Experiment
from meddino_evaluation.segmentation.inference.postprocess import keep_largest
from meddino_evaluation.segmentation.inference.volumes import predict
from meddino_evaluation.segmentation.networks.network import SegmentationNetwork
from meddino_evaluation.segmentation.overlay import overlay_png
from meddino_evaluation.segmentation.report import picture_path
from meddino_evaluation.segmentation.training.fitting import load_network, weights_path

logger = get_logger(__name__)


@dataclass(frozen=True)
class HeldOutRow:
    """One line of cases.csv.

    Attributes:
        fold: Fold whose networks predicted the case.
        seed: Seed of the network.
        patient: Who it is, for resampling patients.
        site: Hospital or scanner, or "".
        row: The metrics.
    """

    fold: int
    seed: int
    patient: str
    site: str
    row: LabelRow

    def values(self) -> dict[str, object]:
        """Return all columns."""
        return {**self.row.values(), "fold": self.fold, "seed": self.seed, "patient": self.patient, "site": self.site}


@dataclass
class HeldOutSet:
    """Cases to be tested, and what has been found.

    Attributes:
        name: "" for the experiment's own test part, else that of a set from elsewhere.
        dataset: Reads the cases; its labels say what is measured.
        out: Folder of its results.
        leakage: Looks for its volumes in the pretraining corpus.
        rows: What was measured.
        failed: Why cases could not be tested, by name.
    """

    name: str
    dataset: LabelledDataset
    out: Path
    leakage: LeakageCheck
    rows: list[HeldOutRow] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def cases(self, split: Split) -> tuple[str, ...]:
        """Return the cases that the networks of a fold are tested on: its test part, or all of a set from elsewhere."""
        if not self.name:
            return split.test
        return tuple(case.name for case in self.dataset.all_cases)


@dataclass(frozen=True)
class FoldNetworks:
    """The trained networks of a fold, one a seed, with the labels of which each keeps only the largest component."""

    split: Split
    rule: GridRule
    networks: tuple[SegmentationNetwork, ...]
    components: tuple[tuple[str, ...], ...]


def open_held_out_set(experiment: Experiment, name: str, root: Path, out: Path, corpus: Path | str | None) -> HeldOutSet:
    """Open a test set from elsewhere and refuse what cannot be compared with the training data.

    Raises:
        ConfigError: Its labels or channels are others, or it holds an image that is trained on.
        VolumeError: A file is missing, or grids differ.
    """
    dataset = with_patients(open_dataset(root), experiment.config.data.patient_pattern)
    dataset = replace(dataset, modality=experiment.dataset.modality)  # what the networks are trained on
    if experiment.config.labels.use:
        there = [label for label in experiment.config.labels.use if label in dataset.labels.names]
        dataset = replace(dataset, labels=dataset.labels.only(there))
    check_labels(name, dataset.labels, experiment.dataset.labels)
    if dataset.flat != experiment.dataset.flat:
        kinds = ("volumes", "pictures")
        raise ConfigError(f"test set {name} holds {kinds[dataset.flat]}, the networks are trained on {kinds[not dataset.flat]}")
    if len(dataset.channel_names) != len(experiment.dataset.channel_names):
        raise ConfigError(
            f"test set {name}: {len(dataset.channel_names)} image channels, and the networks are trained on "
            f"{len(experiment.dataset.channel_names)}"
        )
    check_grids(dataset)
    used = {case for split in experiment.splits for case in (*split.train, *split.val)}
    seen = {experiment.dataset.file_hash(path): case for case in sorted(used) for path in experiment.dataset.case(case).images}
    for case in dataset.all_cases:
        twin = next((seen[dataset.file_hash(path)] for path in case.images if dataset.file_hash(path) in seen), None)
        if twin is not None:
            raise ConfigError(f"test set {name}: case '{case.name}' is the same image as '{twin}', which is trained on")
    return HeldOutSet(
        name, dataset, out / "external" / name, LeakageCheck(experiment.source.lineage, corpus, experiment.source.name)
    )


def check_labels(name: str, other: LabelScheme, trained: LabelScheme) -> None:
    """Refuse labels that the networks were not trained to find; a set may lack some.

    Raises:
        ConfigError: Names them.
    """
    known = dict(zip(trained.names, trained.values, strict=True))
    strange = [label for label, values in zip(other.names, other.values, strict=True) if known.get(label) != values]
    if strange:
        raise ConfigError(
            f"test set {name}: its labels {strange} are not among those trained on under the same name and value: "
            f"{ {label: list(values) for label, values in known.items()} }"
        )


def load_fold(experiment: Experiment, split: Split, out: Path) -> FoldNetworks:
    """Load what a fold has trained."""
    source, seeds = experiment.fold_source(split), experiment.config.seeds
    networks = tuple(experiment.network(source, seed) for seed in seeds)
    components = tuple(
        load_network(network, weights_path(out, split.number, seed)) for network, seed in zip(networks, seeds, strict=True)
    )
    return FoldNetworks(split, experiment.grid_rule(split), networks, components)


def evaluate_all(experiment: Experiment, sets: Sequence[HeldOutSet], out: Path) -> None:
    """Test every set with the networks of every fold.

    Raises:
        VolumeError: No case of a set could be tested.
    """
    for split in experiment.splits:
        fold = load_fold(experiment, split, out)
        experiment.forget()
        for tested in sets:
            for name in tested.cases(split):
                try:
                    _evaluate_case(experiment, fold, tested, tested.dataset.case(name))
                except VolumeError as error:
                    logger.warning("fold %d: case %s is left out: %s", split.number, name, error)
                    tested.failed[name] = str(error)
    for tested in sets:
        if not tested.rows:
            reasons = next(iter(tested.failed.values()), "it holds none")
            raise VolumeError(f"no case of test set {tested.name or experiment.dataset.name} could be tested: {reasons}")


def _evaluate_case(experiment: Experiment, fold: FoldNetworks, tested: HeldOutSet, entry: LabelMapCase) -> None:
    case = prepare_case(tested.dataset, entry, experiment.channels, fold.rule, with_label=False)
    tested.leakage.look(case.name, case.content_hash)
    reference = tested.dataset.read_label(entry, case.source)
    scheme, metrics, number = experiment.dataset.labels, experiment.config.metrics, fold.split.number
    kept = [
        keep_largest(raw, scheme, components)
        for raw, components in zip(predict(experiment, case, fold.networks), fold.components, strict=True)
    ]
    for seed, labels in zip(experiment.config.seeds, kept, strict=True):
        write_label_map(prediction_path(tested.out, fold.split, seed, entry.name), labels, case.source)
        spacing, tolerance = case.source.spacing_mm, metrics.tolerance_mm
        measured = tested.dataset.labels, spacing, tolerance, metrics.surface, tested.dataset.flat
        found = score_case(entry.name, labels, reference, *measured)
        tested.rows += [HeldOutRow(number, seed, entry.patient, entry.site, row) for row in found]
    with atomic_write(picture_path(tested.out, number, entry.name)) as stream:
        stream.write(overlay_png(case, kept[0], reference, tested.dataset.labels))
    logger.info("fold %d: case %s predicted and measured", number, entry.name)


def prediction_path(out: Path, split: Split, seed: int, case: str) -> Path:
    """Return where the prediction of a case lies."""
    return out / "predictions" / f"fold-{split.number}_seed-{seed}" / f"{case}.nii.gz"
