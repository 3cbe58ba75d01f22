"""Training one detector: its steps, its choice on validation, its saves; and what it finds in images."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from meddino.core.device import Machine
from meddino.core.errors import ConfigError
from meddino.core.files import canonical_json
from meddino.core.logging import get_logger
from meddino.core.seeds import derive_seed, numpy_rng
from meddino_evaluation.adaptation.finetune import epoch_batches
from meddino_evaluation.adaptation.fitting import (
    BestCheckpoint,
    Clock,
    FitLoop,
    FreezeCheck,
    StepRecord,
    cosine_decay,
    is_of,
    learned_state,
    load_progress,
    load_state,
    save_progress,
    save_state,
)
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.data.splits import Split
from meddino_evaluation.detection.config import DetectConfig, DetectorName
from meddino_evaluation.detection.dataset import Pictures, Sample, inside
from meddino_evaluation.detection.metrics import ImageResult, coco_ap
from meddino_evaluation.detection.network import Pyramid, build_detector
from meddino_evaluation.detection.readers import BoxCase

_log = get_logger(__name__)
_HEADS: dict[DetectorName, str] = {"faster_rcnn": "roi_heads", "retinanet": "head"}


@dataclass(frozen=True)
class Learning:
    """What a training may look at.

    Attributes:
        model: As `load_backbone` takes it: each training begins with the model as it was loaded.
        model_hash: Of its weights.
        config: All settings.
        classes: Names.
        pictures: Reads images.
        machine: Where to compute.
        hashes: Of the images' pixels, by name.
    """

    model: str
    model_hash: str
    config: DetectConfig
    classes: tuple[str, ...]
    pictures: Pictures
    machine: Machine
    hashes: dict[str, str]

    def identity(self, split: Split, cases: Sequence[BoxCase]) -> str:
        """Return a hash of everything that the weights of a split depend on."""
        settings = self.config.model_dump(mode="json", exclude={"metrics", "device", "precision", "split"})
        what = [(one.name, self.hashes[one.name], one.boxes.tolist(), one.names) for one in cases]
        parts = [self.model_hash, settings, split.train, split.val, self.config.split.seed, what, self.classes]
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def fit_detector(learning: Learning, split: Split, train: Sequence[BoxCase], val: Sequence[BoxCase], out: Path) -> nn.Module:
    """Train a detector, or take up what was trained with the same settings, and return it with its best weights.

    Args:
        learning: Model, settings, images.
        split: Its number names the weights' file.
        train: Cases to learn from.
        val: Cases that choose the epoch.
        out: Folder of the results.

    Raises:
        ConfigError: No validation image has a box.
    """
    config, seed = learning.config, derive_seed(learning.config.split.seed, "detector", split.number) % 2**31
    if not any(len(case.boxes) for case in val):
        raise ConfigError(
            f"split {split.number}: no validation image has a box, so nothing can be chosen; give another split or seed"
        )
    backbone = load_backbone(learning.model).to(learning.machine.device)
    detector = build_detector(backbone, config.encoder, config.detector, len(learning.classes), config.data.image_size_px, seed)
    pyramid = pyramid_of(detector)
    named = nn.ModuleDict({"detector": detector})  # files of weights read names that begin with `backbone.` as an encoder's
    path, identity = out / "weights" / f"repeat-{split.number}.safetensors", learning.identity(split, [*train, *val])
    if is_of(path, identity):
        load_state(named, path, _learned(named))
        return detector.eval()
    per_epoch = len(epoch_batches(len(train), config.training.batch_size, seed, 0))
    epochs = max(config.training.epochs, math.ceil(config.training.min_steps / per_epoch))
    loop = _loop(learning, named, train, seed, per_epoch, epochs)
    best = BestCheckpoint(lambda: _learned(named), named)
    parts = {"pyramid": pyramid.neck, "heads": detector.get_submodule(_HEADS[config.detector.name])}
    learns = any(parameter.requires_grad for parameter in backbone.parameters())
    freeze = FreezeCheck(backbone, parts | ({"encoder": backbone} if learns else {}), all_buffers=True)
    progress, clock, losses = path.with_suffix(".progress"), Clock(epochs * per_epoch), list[float]()
    start = load_progress(progress, loop, best, identity)

    def on_step(record: StepRecord) -> bool:
        losses.append(record.loss)
        clock.tick()
        epoch, rest = divmod(record.step + 1, per_epoch)
        if rest or (epoch % config.training.val_every_epochs and epoch != epochs):
            return True
        score = val_ap50(detector, learning, val)
        best.update(score)
        _log.info(
            "repeat %d, epoch %d of %d: loss %.3f, validation AP50 %.3f%s",
            *(split.number, epoch, epochs, float(np.mean(losses[-per_epoch:])), score, clock.text()),
        )
        save_progress(progress, record.step + 1, loop, _learned(named), best, identity)
        detector.train()
        return True

    detector.train()
    loop.fit(on_step, start)
    freeze.check(config.encoder.mode)
    best.restore()
    save_state(path, _learned(named), {"identity": identity, "chosen": json.dumps({"val_ap50": best.score})})
    progress.unlink(missing_ok=True)
    return detector.eval()


def _learned(named: nn.Module) -> dict[str, Tensor]:
    return learned_state(named, "no buffer moves")


def pyramid_of(detector: nn.Module) -> Pyramid:
    """Return the part of a detector that holds the backbone."""
    pyramid = detector.get_submodule("backbone")
    assert isinstance(pyramid, Pyramid)
    return pyramid


def _loop(
    learning: Learning, named: nn.ModuleDict, train: Sequence[BoxCase], seed: int, per_epoch: int, epochs: int
) -> FitLoop:
    training, machine, detector = learning.config.training, learning.machine, named["detector"]
    encoder = list(pyramid_of(detector).encoder.parameters())
    inner = {id(parameter) for parameter in encoder}
    groups = [{"params": [one for one in detector.parameters() if id(one) not in inner], "lr": training.lr}]
    learns = [one for one in encoder if one.requires_grad]
    groups += [{"params": learns, "lr": training.lr_encoder}] if learns else []
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)

    def loss_of(step: int) -> Tensor:
        epoch, number = divmod(step, per_epoch)
        batch = epoch_batches(len(train), training.batch_size, seed, epoch)[number]
        samples = [_flipped(learning.pictures(train[int(one)]), training.flip, seed, epoch, int(one)) for one in batch]
        torch.manual_seed(derive_seed(seed, "step", step))  # which anchors and boxes a loss looks at, LoRA's dropout
        images = [sample.image.to(machine.device) for sample in samples]
        targets = [{"boxes": sample.boxes.to(machine.device), "labels": sample.labels.to(machine.device)} for sample in samples]
        with machine.autocast():
            losses: dict[str, Tensor] = detector(images, targets)
        return torch.stack([one.float() for one in losses.values()]).sum()

    return FitLoop(
        named, optimizer, cosine_decay(optimizer, epochs * per_epoch), loss_of, epochs * per_epoch, training.clip_norm
    )


def _flipped(sample: Sample, flip: bool, seed: int, epoch: int, place: int) -> Sample:
    if not flip or numpy_rng(seed, "flip", epoch, place).random() >= 0.5:
        return sample
    return mirrored(sample)


def mirrored(sample: Sample) -> Sample:
    """Return a sample with left and right exchanged."""
    side = sample.image.shape[-1]
    boxes = torch.stack([side - sample.boxes[:, 2], sample.boxes[:, 1], side - sample.boxes[:, 0], sample.boxes[:, 3]], 1)
    return Sample(sample.image.flip(-1), boxes, sample.labels, sample.scale, sample.size_px)


@torch.no_grad()
def find_boxes(detector: nn.Module, learning: Learning, cases: Sequence[BoxCase]) -> list[ImageResult]:
    """Return what a detector finds in images, in their stored pixels, beside what is there."""
    detector.eval()
    results, size = [], learning.config.training.batch_size
    for start in range(0, len(cases), size):
        part = cases[start : start + size]
        samples = [learning.pictures(case) for case in part]
        with learning.machine.autocast():
            outputs = detector([sample.image.to(learning.machine.device) for sample in samples])
        results += [_result(*one, learning.classes) for one in zip(part, samples, outputs, strict=True)]
    return results


def _result(case: BoxCase, sample: Sample, output: dict[str, Tensor], classes: Sequence[str]) -> ImageResult:
    height, width = sample.size_px
    boxes = output["boxes"].double().cpu().numpy() / np.tile(sample.scale, 2)
    boxes = np.clip(boxes, 0, [width, height, width, height])
    labels, scores = output["labels"].cpu().numpy(), output["scores"].double().cpu().numpy()
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & (labels > 0)  # none lies wholly beside the picture
    truth = np.array([classes.index(name) + 1 for name in case.names], dtype=np.int64)
    return ImageResult(
        case.name, case.patient, inside(case, sample.size_px), truth, boxes[kept], labels[kept].astype(np.int64), scores[kept]
    )


def val_ap50(detector: nn.Module, learning: Learning, val: Sequence[BoxCase]) -> float:
    """Return the mean AP50 over the classes that the validation images have."""
    return float(np.nanmean(coco_ap(find_boxes(detector, learning, val), len(learning.classes))[0]))
