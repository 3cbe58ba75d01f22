"""`meddino-eval probe`, from a data set and models to numbers on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import meddino
from meddino.core.device import Machine, find_machine, use_cpu_threads
from meddino.core.errors import ConfigError
from meddino.core.files import write_json
from meddino.core.logging import get_logger
from meddino.core.seeds import numpy_rng
from meddino_evaluation.data.dataset import LabelledDataset, check_grids, with_patients
from meddino_evaluation.data.fingerprint import median_plane_spacing
from meddino_evaluation.data.layouts import open_dataset
from meddino_evaluation.data.leakage import LeakageCheck
from meddino_evaluation.data.prepare import GridRule, PreparedCase
from meddino_evaluation.data.prepared_cache import prepare_cached
from meddino_evaluation.data.run_folder import refuse_files_of_others, write_settings
from meddino_evaluation.data.splits import SPLITS_FILE, Split, choose_split, left_out, make_folds, of_folds, read_folds
from meddino_evaluation.metrics.statistics import SHARE, Resampling, mean_and_std
from meddino_evaluation.metrics.tables import finite_or_none, write_cases
from meddino_evaluation.segmentation.config import LabelsConfig
from meddino_evaluation.segmentation.dense_probe.config import ProbeConfig
from meddino_evaluation.segmentation.dense_probe.patches import PIXELS, PatchSet, encode_slices, join, thinned
from meddino_evaluation.segmentation.dense_probe.readout import (
    Counts,
    Fitted,
    best_on_validation,
    class_mean,
    count_patches,
    f1_scores,
    fit_all,
    macro_f1,
)
from meddino_evaluation.segmentation.networks.encoders import load_encoder
from meddino_evaluation.segmentation.networks.network import EncoderSource
from meddino_evaluation.segmentation.training.samples import choose_slices

logger = get_logger(__name__)
CHOSEN = "chosen"
"""The readout that validation chose among all of a model's; the others are named `logistic/blocks1`, `knn/blocks4`, ..."""


RESULTS = ("cases.csv", "metrics.json")
COLUMNS = ("model", "readout", "setting", "fold", "seed", "patient", "label", "tp", "fp", "fn")


@dataclass(frozen=True)
class Outcome:
    """What one fold and one draw of labelled slices said of one readout.

    Attributes:
        fold: Number of the fold.
        seed: Draw of the labelled slices.
        readout: `chosen`, or features and readout.
        setting: What validation chose, for people.
        patients: Names, in the order of `counts`.
        counts: Of test patches.
    """

    fold: int
    seed: int
    readout: str
    setting: str
    patients: tuple[str, ...]
    counts: Counts


def run_probe(
    config: ProbeConfig, models: Mapping[str, str], data: Path, out: Path, corpus: Path | str | None = None
) -> dict[str, Any]:
    """Probe models on a labelled data set, and write cases.csv and metrics.json.

    Args:
        config: Settings.
        models: Name in the tables to what `load_encoder` knows. The pixels of the patches stand beside them.
        data: A labelled data set, 2D or 3D.
        out: Folder for the results; config.yaml stands there from the start.
        corpus: Corpus the models learned from, where no export names its volumes.

    Returns:
        What metrics.json holds.

    Raises:
        MedDINOError: The data set, a model or the splits are wrong.
    """
    refuse_files_of_others(out, RESULTS)
    use_cpu_threads()
    machine = find_machine(config.device, config.precision)
    dataset = with_patients(open_dataset(data), config.data.patient_pattern)
    if dataset.labels.has_regions:
        raise ConfigError(f"{data}: its labels are regions that overlap; a probe needs one class for each patch")
    check_grids(dataset)
    splits = _splits(config, dataset)
    write_settings(out, config)
    outcomes: dict[str, list[Outcome]] = {}
    leakage: dict[str, Any] = {}
    cases = PreparedCases(config, dataset)
    pixels: dict[tuple[Any, ...], str] = {}
    for name, model in models.items():
        source = load_encoder(model, config.random_seed)
        source.backbone.to(machine.device)
        check = LeakageCheck(source.lineage, corpus, source.name)
        # Models of equal patches and windows share their pixels.
        cut = (source.backbone.patch_size, source.contract.multiple_px, source.contract.ct_window)
        kinds = {name: [f"blocks{count}" for count in config.blocks]}
        if cut not in pixels:
            pixels[cut] = PIXELS if not pixels else f"{PIXELS} as of {name}"
            kinds[pixels[cut]] = [PIXELS]
        for split in splits:
            for label, found in _probe_fold(config, cases, split, kinds, source, machine, check).items():
                outcomes.setdefault(label, []).extend(found)
        leakage[name] = {**check.summary(), "model_hash": source.model_hash}
    metrics = {
        "data": {
            "name": dataset.name,
            "hash": dataset.data_hash([*dataset.cases, *dataset.test_cases]),
            "notes": list(dataset.notes),
        },
        "splits": [asdict(split) for split in splits],
        "models": {label: _summary(found, dataset, config) for label, found in outcomes.items()},
        "leakage": leakage,
        "config": config.model_dump(mode="json"),
        "version": meddino.__version__,
    }
    write_cases(out / "cases.csv", _case_rows(outcomes, dataset), COLUMNS)
    write_json(out / "metrics.json", metrics)
    return metrics


def _splits(config: ProbeConfig, dataset: LabelledDataset) -> list[Split]:
    """Return the fold with the data set's own test part, or every fold, so that each patient is tested once."""
    own = dataset.root / SPLITS_FILE
    asked = config.splits.file
    path = Path(asked) if asked is not None else own if own.is_file() else None
    patients = len({case.patient for case in dataset.cases})
    count = min(config.splits.folds, patients)
    folds = read_folds(path) if path else make_folds(dataset.cases, count, config.splits.seed)
    numbers = config.splits.run_folds if dataset.test_cases else range(len(folds))
    lost = left_out(dataset.cases, of_folds(folds))
    if lost:
        logger.warning("%s: %s", path, lost)
    splits = [
        choose_split(dataset.cases, dataset.test_cases, folds, fold, config.splits.val_fraction, config.splits.seed)
        for fold in numbers
    ]
    for split in splits:
        if not split.val:
            raise ConfigError(
                f"fold {split.number}: no patient is left to select on ({len(split.train)} to learn from, {len(split.test)} to "
                "test); give more patients, fewer splits.folds or a larger splits.val_fraction"
            )
    return splits


class PreparedCases:
    """Cases on the grid of a fold, each prepared once for all models and folds that want it so."""

    def __init__(self, config: ProbeConfig, dataset: LabelledDataset) -> None:
        self.config, self.dataset = config, dataset
        self._prepared: dict[tuple[str, GridRule], PreparedCase] = {}

    def of(self, names: Sequence[str], split: Split) -> list[PreparedCase]:
        """Return cases by name."""
        rule, cache = _grid_rule(self.config, self.dataset, split), self.config.data.cache
        for name in names:
            if (name, rule) not in self._prepared:
                case = self.dataset.case(name)
                self._prepared[name, rule] = prepare_cached(self.dataset, case, (0,), rule, Path(cache) if cache else None)
        return [self._prepared[name, rule] for name in names]


def _probe_fold(
    config: ProbeConfig,
    cases: PreparedCases,
    split: Split,
    kinds: Mapping[str, Sequence[str]],
    source: EncoderSource,
    machine: Machine,
    leakage: LeakageCheck,
) -> dict[str, list[Outcome]]:
    """Probe one model on one fold.

    Args:
        config: Settings.
        cases: Of the data set.
        split: The fold.
        kinds: Name in the tables -> the kinds of features that stand for it.
        source: The model.
        machine: Device and arithmetic.
        leakage: Is shown every test case.
    """
    dataset = cases.dataset
    train, val, test = (cases.of(names, split) for names in (split.train, split.val, split.test))
    for case in test:
        leakage.look(case.name, case.content_hash)
    patients = tuple(dict.fromkeys(dataset.case(one).patient for one in split.test))

    def encoded(case: PreparedCase, slices: Sequence[int], patient: int) -> PatchSet:
        return encode_slices(case, slices, patient, dataset.labels, source.backbone, config.blocks, machine, config.batch_size)

    def looked_at(some: Sequence[PreparedCase], order: Sequence[str]) -> PatchSet:
        parts = [encoded(c, _spread(c, config.case_slices), order.index(dataset.case(c.name).patient)) for c in some]
        return join(parts)

    val_order = tuple(dict.fromkeys(dataset.case(one).patient for one in split.val))
    on_val, on_test = looked_at(val, val_order), looked_at(test, patients)
    classes = dataset.labels.num_outputs
    names = [name for features in kinds.values() for name in features]
    results: dict[str, list[Outcome]] = {label: [] for label in kinds}
    for seed in config.seeds:
        refs = choose_slices(train, LabelsConfig(train_slices=config.train_slices), seed)
        chosen = join([encoded(train[ref.case], [ref.z], ref.case) for ref in refs])
        learnt = thinned(chosen, config.patches_per_label, numpy_rng(seed, "probe-patches"))
        fitted = fit_all(learnt, on_val, on_test, names, config, classes)
        for label, features in kinds.items():
            best = best_on_validation(fitted, features)
            readouts = {CHOSEN: best} | {f"{one.readout}/{one.features}": one for one in fitted if one.features in features}
            results[label] += [
                Outcome(split.number, seed, readout, _words(one), patients, _counts(one, on_test, len(patients), classes))
                for readout, one in readouts.items()
            ]
    return results


def _grid_rule(config: ProbeConfig, dataset: LabelledDataset, split: Split) -> GridRule:
    data = config.data
    if data.resample == "spacing":
        return GridRule(spacing_mm=data.spacing_mm)
    if data.resample == "plan":
        return GridRule(spacing_mm=median_plane_spacing([dataset.geometry(dataset.case(name)) for name in split.train]))
    return GridRule(size_px=data.size_px) if data.resample == "size" else GridRule()


def _spread(case: PreparedCase, count: int) -> list[int]:
    """Return evenly spaced slices among those that hold a label; of all slices where none does."""
    labelled = [z for z, values in enumerate(case.present) if values] or list(range(case.num_slices))
    places = np.unique(np.linspace(0, len(labelled) - 1, min(count, len(labelled))).round().astype(int))
    return [labelled[place] for place in places]


def _counts(fitted: Fitted, test: PatchSet, patients: int, classes: int) -> Counts:
    return count_patches(fitted.predicted, test, patients, classes)


def _words(fitted: Fitted) -> str:
    what = f"k={int(fitted.setting)}" if fitted.readout == "knn" else f"C={fitted.setting:g}"
    return f"{fitted.readout}/{fitted.features} {what}"


def _summary(outcomes: Sequence[Outcome], dataset: LabelledDataset, config: ProbeConfig) -> dict[str, Any]:
    """Summarise one model: for each readout its macro-F1 over seeds, an interval over patients, and every class."""
    summary: dict[str, Any] = {}
    for readout in dict.fromkeys(one.readout for one in outcomes):
        pooled = {seed: _over_folds([o for o in outcomes if o.readout == readout and o.seed == seed]) for seed in config.seeds}
        by_seed = [macro_f1(counts) for _, counts in pooled.values()]
        mean, std = mean_and_std(by_seed)
        every = np.stack([f1_scores(counts.sum(0)) for _, counts in pooled.values()])
        own = [[macro_f1(counts[[p]]) for p in range(len(names))] for names, counts in pooled.values()]
        summary[readout] = {
            "macro_f1": {
                "mean": finite_or_none(mean),
                "std": finite_or_none(std),
                "by_seed": [finite_or_none(value) for value in by_seed],
            },
            "interval_95": _interval([counts for _, counts in pooled.values()], config.bootstrap),
            "mean_over_patients": finite_or_none(float(np.nanmean(own))) if np.isfinite(own).any() else None,
            "by_label": {name: finite_or_none(_mean(every[:, place])) for place, name in enumerate(dataset.labels.names)},
            "chosen": {f"fold {o.fold}, seed {o.seed}": o.setting for o in outcomes if o.readout == readout},
        }
    return summary


def _over_folds(outcomes: Sequence[Outcome]) -> tuple[list[str], Counts]:
    """Put the patients of all folds together; each is tested in one fold."""
    return [name for one in outcomes for name in one.patients], np.concatenate([one.counts for one in outcomes])


def _interval(counts: Sequence[Counts], resamples: int) -> list[float | None]:
    """Return the 95 % bootstrap interval over patients of macro-F1, averaged over seeds within a resample."""
    patients = len(counts[0])
    if patients < 2 or resamples == 0:
        return [None, None]
    drawing = Resampling(patients, resamples=resamples)
    weights = drawing.weights()
    drawn = [class_mean(f1_scores(np.tensordot(weights, one, axes=1))) for one in counts]
    found = drawing.interval(float(np.mean([macro_f1(one) for one in counts])), np.mean(drawn, axis=0), SHARE)
    return [finite_or_none(found.low), finite_or_none(found.high)]


def _mean(values: Any) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _case_rows(outcomes: Mapping[str, Sequence[Outcome]], dataset: LabelledDataset) -> list[dict[str, Any]]:
    """Return one row for each model, readout, seed, patient and label: every number can be computed from them."""
    return [
        {
            "model": model,
            "readout": one.readout,
            "setting": one.setting,
            "fold": one.fold,
            "seed": one.seed,
            "patient": patient,
            "label": name,
            **dict(zip(("tp", "fp", "fn"), one.counts[place, label].tolist(), strict=True)),
        }
        for model, found in outcomes.items()
        for one in found
        for place, patient in enumerate(one.patients)
        for label, name in enumerate(dataset.labels.names, start=1)
    ]
