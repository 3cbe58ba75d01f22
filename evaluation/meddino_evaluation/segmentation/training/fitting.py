"""Training one (fold, seed): its data, selection on validation, saves, and the proof that what is held was held."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import meddino
from meddino.core.files import canonical_json, write_json
from meddino.core.logging import get_logger
from meddino_evaluation.adaptation.trainable import held_tensors
from meddino_evaluation.data.prepare import PreparedCase
from meddino_evaluation.data.splits import Split
from meddino_evaluation.metrics.label_metrics import mean_over_cases
from meddino_evaluation.segmentation.config import TrainingConfig
from meddino_evaluation.segmentation.experiment import Experiment
from meddino_evaluation.segmentation.inference.postprocess import keep_largest, labels_it_helps
from meddino_evaluation.segmentation.inference.prediction import predict, score
from meddino_evaluation.segmentation.networks.network import EncoderSource, SegmentationNetwork, learned_state
from meddino_evaluation.segmentation.training.loop import StepRecord, Trainer
from meddino_evaluation.segmentation.training.map_cache import MapCache
from meddino_evaluation.segmentation.training.samples import CropSampler, choose_slices
from meddino_evaluation.segmentation.training.trained import Progress, load_progress, save_network, save_progress, weights_path

logger = get_logger(__name__)


class Fitting:
    """Trains the networks of one fold.

    Args:
        experiment: Data, model, settings.
        split: The fold.
        out: Folder of the results.
        identity: Of the run.
    """

    def __init__(self, experiment: Experiment, split: Split, out: Path, identity: str) -> None:
        self.experiment, self.split, self.out, self.identity = experiment, split, out, identity
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
        window = network.contract.window_hu
        sampler = CropSampler(cases, slices, training, config.data.neighbour_slices, window, seed)
        trainer = Trainer(
            network, sampler, experiment.dataset.labels, training, experiment.machine, self._maps_of(network), seed
        )
        logger.info(
            "fold %d, seed %d: %d cases, %d labelled slices, %d steps",
            self.split.fold,
            seed,
            len(cases),
            len(slices),
            training.steps,
        )
        guard = FreezeCheck(network)
        best = BestCheckpoint(experiment, self.split, network) if training.selection == "best_val" else None
        self._run(trainer, best, seed, training, keep)
        if best is not None:
            best.restore()
        guard.check()
        if keep:
            save_network(network, weights_path(self.out, self.split.fold, seed), self.identity, self._components(network))
            self._save_path(seed).unlink(missing_ok=True)
        return best.best_dice if best else None

    def choose_lr(self, seed: int) -> float | None:
        """Try the learning rates of the grid and return the best by validation Dice; None if there is no grid."""
        grid = self.experiment.config.training.lr_head_grid
        if not grid:
            return None
        path = self.out / "logs" / f"fold-{self.split.fold}_lr.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if known.get("identity") == self.identity:
            return float(known["chosen"])
        dice = {lr: self.fit_seed(seed, lr, keep=False) for lr in grid}
        chosen = max(grid, key=lambda lr: -math.inf if dice[lr] is None else float(dice[lr] or 0.0))
        write_json(path, {"identity": self.identity, "val_dice": {str(lr): dice[lr] for lr in grid}, "chosen": chosen})
        logger.info("fold %d: training.lr_head=%g chosen on validation among %s", self.split.fold, chosen, list(grid))
        return chosen

    def _run(self, trainer: Trainer, best: "BestCheckpoint | None", seed: int, training: TrainingConfig, keep: bool) -> None:
        path = self._save_path(seed)
        progress = load_progress(path, trainer, self.identity) if keep else None
        if progress is not None:
            logger.info("fold %d, seed %d: going on after step %d", self.split.fold, seed, progress.step)
            if best is not None:
                best.resume(progress)
        log = self.out / "logs" / f"fold-{self.split.fold}_seed-{seed}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        start = progress.step if progress else 0
        with log.open("a" if start else "w", encoding="utf-8") as stream:

            def on_step(record: StepRecord) -> bool:
                done = record.step + 1
                last = done == training.steps
                if record.step % training.log_every_steps == 0 or last:
                    stream.write(json.dumps(asdict(record)) + "\n")
                    logger.info(
                        "fold %d, seed %d, step %d/%d: loss %.4f", self.split.fold, seed, done, training.steps, record.loss
                    )
                if best is not None and (done % training.val_every_steps == 0 or last):
                    stream.write(json.dumps({"step": record.step, "val_dice": best.look(done)}) + "\n")
                if keep and training.save_every_steps and done % training.save_every_steps == 0 and not last:
                    stream.flush()
                    save_progress(path, trainer, best.progress(done) if best else Progress(done, None, None, 0), self.identity)
                return best is None or not training.patience or best.validations_without_gain < training.patience

            trainer.fit(on_step, start)

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
        logger.info("fold %d: only the largest component is kept of %s", self.split.fold, list(helped) or "no label")
        return helped

    def _save_path(self, seed: int) -> Path:
        return self.out / "weights" / f"fold-{self.split.fold}_seed-{seed}.progress.safetensors"


class BestCheckpoint:
    """Keeps what learned of the network at its best validation Dice.

    Args:
        experiment: Gives the validation cases.
        split: Fold.
        network: Is put back to training after each look.
    """

    def __init__(self, experiment: Experiment, split: Split, network: SegmentationNetwork) -> None:
        self.experiment, self.split, self.network = experiment, split, network
        self.best_dice: float | None = None
        self.best: dict[str, Tensor] | None = None
        self.validations_without_gain = 0

    def look(self, step: int) -> float | None:
        """Measure the validation cases; None if no label is defined there."""
        rows = []
        for _, predicted, reference, case in validation(self.experiment, self.split, self.network):
            rows += [row.values() for row in score(self.experiment, case, predicted, reference, surface=False)]
        self.network.train()
        dice, count = mean_over_cases(rows, "dice")
        if not count:
            return None
        logger.info("fold %d, step %d: validation Dice %.4f on %d cases", self.split.fold, step, dice, count)
        self.validations_without_gain += 1
        if self.best_dice is None or dice > self.best_dice:
            self.best_dice, self.validations_without_gain = dice, 0
            self.best = {name: value.detach().clone() for name, value in learned_state(self.network).items()}
        return dice

    def restore(self) -> None:
        """Put the best weights back."""
        if self.best is not None:
            self.network.load_state_dict(self.best, strict=False)

    def progress(self, step: int) -> Progress:
        """Return what a save must hold."""
        return Progress(step, self.best_dice, self.best, self.validations_without_gain)

    def resume(self, progress: Progress) -> None:
        """Go on from a save."""
        self.best_dice, self.best, self.validations_without_gain = (
            progress.best_dice,
            progress.best,
            progress.validations_without_gain,
        )


class FreezeCheck:
    """Looks at a network before and after training: what is held is identical, what learns has moved."""

    def __init__(self, network: SegmentationNetwork) -> None:
        self.network = network
        self.held = self._held()
        self.learned = {name: value.detach().clone() for name, value in learned_state(network).items()}

    def check(self) -> None:
        """Raise if a held tensor moved or nothing of a learning part did (a fault of ours, not the user's)."""
        now = self._held()
        moved = [name for name, value in self.held.items() if not _same(value, now[name])]
        if moved:
            raise RuntimeError(f"encoder.mode={self.network.mode}, but the encoder's weights moved: {moved[:5]}")
        state = learned_state(self.network)
        parts = ("head.", "backbone.") if self.network.trains_encoder else ("head.",)
        for part in parts:
            if all(_same(value, state[name]) for name, value in self.learned.items() if name.startswith(part)):
                raise RuntimeError(f"{part[:-1]} was to learn, but none of its weights moved")

    def _held(self) -> dict[str, Tensor]:
        # A learning batch norm's statistics may move; whatever else does not learn is copied.
        return {name: value.detach().clone() for name, value in held_tensors(self.network.backbone)}


def _same(first: Tensor, second: Tensor) -> bool:
    return np.array_equal(first.detach().cpu().float().numpy(), second.detach().cpu().float().numpy(), equal_nan=True)


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
