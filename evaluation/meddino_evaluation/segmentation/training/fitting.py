"""Training one (fold, seed) of a segmentation: its data, its loss, selection on validation, saves."""

import hashlib
import json
import math
import resource
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import meddino
from meddino.core.files import canonical_json, write_json
from meddino.core.logging import get_logger
from meddino.core.seeds import derive_seed
from meddino_evaluation.adaptation.fitting import (
    BestCheckpoint,
    Clock,
    FitLoop,
    FreezeCheck,
    StepRecord,
    linear_decay,
    load_progress,
    load_state,
    save_progress,
    save_state,
)
from meddino_evaluation.data.prepare import PreparedCase
from meddino_evaluation.data.splits import Split
from meddino_evaluation.metrics.label_metrics import mean_over_cases
from meddino_evaluation.segmentation.config import TrainingConfig
from meddino_evaluation.segmentation.experiment import Experiment
from meddino_evaluation.segmentation.inference.postprocess import keep_largest, labels_it_helps
from meddino_evaluation.segmentation.inference.volumes import predict, score
from meddino_evaluation.segmentation.networks.network import EncoderSource, SegmentationNetwork, model_input
from meddino_evaluation.segmentation.training.losses import segmentation_loss
from meddino_evaluation.segmentation.training.map_cache import CropKey, MapCache
from meddino_evaluation.segmentation.training.samples import CropSampler, choose_slices

logger = get_logger(__name__)


class Fitting:
    """Trains the networks of one fold.

    Args:
        experiment: Data, model, settings.
        split: The fold.
        out: Folder of the results.
        identity: Of the run.
        clock: Of all trainings of the run.
    """

    def __init__(self, experiment: Experiment, split: Split, out: Path, identity: str, clock: Clock) -> None:
        self.experiment, self.split, self.out, self.identity, self.clock = experiment, split, out, identity, clock
        self.source: EncoderSource = experiment.fold_source(split)
        self.rule = experiment.grid_rule(split)
        self._cache: MapCache | None = None

    def fit_seed(self, seed: int, lr_head: float | None = None, keep: bool = True) -> float | None:
        """Train the network of a seed and write its weights.

        Args:
            seed: Of head, slices, crops and augmentation.
            lr_head: Instead of the config's.
            keep: Write weights; else only the validation Dice is wanted.

        Returns:
            The best validation Dice, where something is selected.
        """
        experiment, config = self.experiment, self.experiment.config
        training = config.training if lr_head is None else config.training.model_copy(update={"lr_head": lr_head})
        cases = [experiment.prepare(name, self.rule) for name in experiment.training_cases(self.split, seed)]
        slices = choose_slices(cases, config.labels, seed)
        network = experiment.network(self.source, seed)
        window = network.contract.shown_range
        sampler = CropSampler(cases, slices, training, config.data.neighbour_slices, window, seed)
        loop = self._loop(network, sampler, training, seed)
        name = f"fold {self.split.number}, seed {seed}"
        logger.info("%s: %d cases, %d labelled slices, %d steps", name, len(cases), len(slices), training.steps)
        tell_absent(experiment, sampler.values, name)
        parts = {"head": network.head} | ({"encoder": network.backbone} if network.trains_encoder else {})
        freeze = FreezeCheck(network.backbone, parts)
        best = BestCheckpoint(network.learned_state, network) if training.selection == "best_val" else None
        network.train()
        self._run(loop, network, best, seed, training, keep)
        freeze.check(network.mode)
        if best is not None:
            best.restore()
        if keep:
            save_network(network, weights_path(self.out, self.split.number, seed), self.identity, self._components(network))
            self._save_path(seed).unlink(missing_ok=True)
        return best.score if best else None

    def choose_lr(self, seed: int) -> float | None:
        """Try the learning rates of the grid and return the best by validation Dice; None if there is no grid."""
        grid = self.experiment.config.training.lr_head_grid
        if not grid:
            return None
        path = self.out / "logs" / f"fold-{self.split.number}_lr.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if known.get("identity") == self.identity:
            return float(known["chosen"])
        dice = {lr: self.fit_seed(seed, lr, keep=False) for lr in grid}
        chosen = max(grid, key=lambda lr: -math.inf if dice[lr] is None else float(dice[lr] or 0.0))
        write_json(path, {"identity": self.identity, "val_dice": {str(lr): dice[lr] for lr in grid}, "chosen": chosen})
        logger.info("fold %d: training.lr_head=%g chosen on validation among %s", self.split.number, chosen, list(grid))
        return chosen

    def _loop(self, network: SegmentationNetwork, sampler: CropSampler, training: TrainingConfig, seed: int) -> FitLoop:
        machine, labels, cache = self.experiment.machine, self.experiment.dataset.labels, self._maps_of(network)

        def loss_of(step: int) -> Tensor:
            batch = sampler.batch(step)
            torch.manual_seed(derive_seed(seed, "step", step))  # drop path and coordinate augmentation of a learning encoder
            inputs = model_input(batch.intensities, network.contract).to(machine.device)
            with machine.autocast():
                if cache is None:
                    logits = network(inputs)
                else:
                    keys = [CropKey(sampler.cases[crop.case].name, crop.z, crop.y, crop.x) for crop in batch.crops]
                    logits = network.head(cache.maps(inputs, keys), inputs)
            return segmentation_loss(logits, batch.labels, labels, training.dice_weight, training.ce_weight)

        optimizer = build_optimizer(network, training)
        return FitLoop(
            network, optimizer, linear_decay(optimizer, training.steps), loss_of, training.steps, clip_norm=training.clip_norm
        )

    def _run(
        self,
        loop: FitLoop,
        network: SegmentationNetwork,
        best: BestCheckpoint | None,
        seed: int,
        training: TrainingConfig,
        keep: bool,
    ) -> None:
        path, name = self._save_path(seed), f"fold {self.split.number}, seed {seed}"
        start = load_progress(path, loop, best, self.identity) if keep else 0
        if start:
            logger.info("%s: going on after step %d", name, start)
            self.clock.left -= start
        with open_log(self.out, self.split.number, seed, goes_on=bool(start)) as stream:

            def on_step(record: StepRecord) -> bool:
                done = record.step + 1
                last = done == training.steps
                self.clock.tick()
                if self.clock.done == Clock.TIMED_STEPS:
                    logger.info(
                        "%d steps timed%s; peak memory %.1f GiB", Clock.TIMED_STEPS, self.clock.text(), peak_memory_gib()
                    )
                if record.step % training.log_every_steps == 0 or last:
                    log_step(stream, record, name, training.steps, self.clock)
                if best is not None and (done % training.val_every_steps == 0 or last):
                    dice = self._validate(network)
                    stream.write(json.dumps({"step": record.step, "val_dice": dice}) + "\n")
                    if dice is not None:
                        best.update(dice)
                if keep and training.save_every_steps and done % training.save_every_steps == 0 and not last:
                    stream.flush()
                    save_progress(path, done, loop, network.learned_state(), best, self.identity)
                return best is None or not training.patience or best.validations_without_gain < training.patience

            loop.fit(on_step, start)

    def _validate(self, network: SegmentationNetwork) -> float | None:
        """Return the Dice of the validation cases; None if no label is defined there."""
        rows = []
        for _, predicted, reference, case in validation(self.experiment, self.split, network):
            rows += [row.values() for row in score(self.experiment, case, predicted, reference, surface=False)]
        network.train()
        dice, count = mean_over_cases(rows, "dice")
        if count:
            logger.info("fold %d: validation Dice %.4f on %d cases", self.split.number, dice, count)
        return dice if count else None

    def _maps_of(self, network: SegmentationNetwork) -> MapCache | None:
        training = self.experiment.config.training
        once = training.crops == "grid" and training.augmentation == "none"
        if network.trains_encoder or not once or not network.backbone.stages():
            return None
        if self._cache is None:
            self._cache = MapCache(network, self.experiment.machine, training.map_cache_mib, self._maps_folder())
        return self._cache

    def _maps_folder(self) -> Callable[[str], Path] | None:
        """Return where maps of a case are kept: by the model, the settings and the case's files; None without data.cache."""
        experiment, config = self.experiment, self.experiment.config
        if experiment.cache is None:
            return None
        parts = {
            "model": self.source.model_hash,
            "contract": repr(self.source.contract),
            "channels": experiment.channels,
            "neighbours": config.data.neighbour_slices,
            "rule": asdict(self.rule),
            "crop_px": config.training.crop_px,
            "taps": config.encoder.taps,
            "precision": str(experiment.machine.compute_dtype),
            "version": meddino.__version__,
        }
        folder = experiment.cache / f"maps-{hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:20]}"
        dataset = experiment.dataset
        return lambda case: folder / f"{case}-{dataset.data_hash([dataset.case(case)])[:20]}"

    def _components(self, network: SegmentationNetwork) -> Sequence[str]:
        rule = self.experiment.config.inference.largest_component
        scheme = self.experiment.dataset.labels
        if rule != "if_val_better":
            return scheme.names if rule == "always" else ()
        before: list[dict[str, float]] = []
        after: list[dict[str, float]] = []
        for _, predicted, reference, case in validation(self.experiment, self.split, network):
            cleaned = keep_largest(predicted, scheme, scheme.names)
            for rows, labels in ((before, predicted), (after, cleaned)):
                rows.append({row.label: row.dice for row in score(self.experiment, case, labels, reference, surface=False)})
        helped = labels_it_helps(before, after)
        logger.info("fold %d: only the largest component is kept of %s", self.split.number, list(helped) or "no label")
        return helped

    def _save_path(self, seed: int) -> Path:
        return self.out / "weights" / f"fold-{self.split.number}_seed-{seed}.progress.safetensors"


def validation(
    experiment: Experiment, split: Split, network: SegmentationNetwork
) -> list[tuple[str, NDArray[np.int32], NDArray[np.int32], PreparedCase]]:
    """Predict the validation cases: (name, prediction, reference, case) of each."""
    rule = experiment.grid_rule(split)
    found = []
    for name in split.val:
        case = experiment.prepare(name, rule)
        reference = experiment.dataset.read_label(experiment.dataset.case(name), case.source)
        found.append((name, predict(experiment, case, [network])[0], reference, case))
    return found


def peak_memory_gib() -> float:
    """Return the most memory that this process has held so far: on the GPU if there is one, else in all."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def open_log(out: Path, fold: int, seed: int, goes_on: bool = False) -> IO[str]:
    """Open the log of a training, one JSON line a noted step; one that goes on is added to."""
    log = out / "logs" / f"fold-{fold}_seed-{seed}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("a" if goes_on else "w", encoding="utf-8")


def tell_absent(experiment: Experiment, present: Collection[int], name: str) -> None:
    """Name the labels that no training slice holds: nothing can learn them."""
    absent = experiment.dataset.labels.absent(present)
    if absent:
        logger.warning("%s: no training slice holds the labels %s: nothing can learn them", name, absent)


def log_step(stream: IO[str], record: StepRecord, name: str, steps: int, clock: Clock) -> None:
    """Write a step into the log, and say it with the time that is left."""
    stream.write(json.dumps(asdict(record)) + "\n")
    logger.info("%s, step %d/%d: loss %.4f%s", name, record.step + 1, steps, record.loss, clock.text())


def weights_path(out: Path, fold: int, seed: int) -> Path:
    """Return where the weights of a fold and seed lie."""
    return out / "weights" / f"fold-{fold}_seed-{seed}.safetensors"


def save_network(network: SegmentationNetwork, path: Path, identity: str, components: Sequence[str] = ()) -> None:
    """Write what learned, under the identity of its run, and the labels of which only the largest component is kept."""
    save_state(path, network.learned_state(), {"identity": identity, "largest_component": json.dumps(list(components))})


def load_network(network: SegmentationNetwork, path: Path) -> tuple[str, ...]:
    """Fill a freshly built network; see `load_state`. Returns the labels of which only the largest component is kept."""
    notes = load_state(network, path, network.learned_state())
    return tuple(json.loads(notes.get("largest_component", "[]")))


def build_optimizer(network: SegmentationNetwork, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over what learns; head and encoder have learning rates of their own."""
    groups = []
    lr_encoder = config.lr_adapter if network.mode in ("lora", "bitfit") else config.lr_encoder
    for module, lr in ((network.head, config.lr_head), (network.backbone, lr_encoder)):
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if learning:
            groups.append({"params": learning, "lr": lr})
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
