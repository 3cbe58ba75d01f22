"""Training through the backbone: end to end, partly, LoRA, BitFit. Validation chooses the epoch; the test is not seen."""

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meddino.core.device import Machine
from meddino.core.logging import get_logger
from meddino.core.seeds import derive_seed, numpy_rng, torch_rng
from meddino_evaluation.adaptation.features import Transform, model_input, read_case
from meddino_evaluation.adaptation.heads import Probabilities, class_loss, class_probabilities
from meddino_evaluation.adaptation.trainable import Adaptation, adapt, held_tensors, set_training_mode
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.classification.config import FinetuneConfig
from meddino_evaluation.classification.datasets import Case, labels_array
from meddino_evaluation.metrics.classification import TaskKind, selection_score

_log = get_logger(__name__)
_BANK_BYTES = 2**31


class ImageBank:
    """Model inputs of cases, kept in memory as far as two GiB go, read again beyond that."""

    def __init__(self, backbone: Backbone, transform: Transform) -> None:
        self.backbone = backbone
        self.transform = transform
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0

    def __call__(self, case: Case) -> Tensor:
        """Return [slices, C, size, size]."""
        if case.source in self._kept:
            return self._kept[case.source]
        stack = read_case(case, self.transform)
        images = model_input(self.backbone, stack, self.transform.slice_numbers(len(stack.values)), self.transform)
        size = images.numel() * images.element_size()
        if self._bytes + size <= _BANK_BYTES:
            self._kept[case.source] = images
            self._bytes += size
        return images


class Classifier(nn.Module):
    """A backbone and a linear head on its CLS-like vector, averaged over the real slices of a volume."""

    def __init__(self, backbone: Backbone, outputs: int, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, outputs)
        with torch.no_grad():
            self.head.weight.normal_(0.0, 0.01, generator=rng)
            self.head.bias.zero_()

    def forward(self, images: Tensor, counts: Sequence[int]) -> Tensor:
        """Return class scores [cases, outputs] of slices [sum(counts), C, H, W]."""
        vectors = self.backbone(images)
        pooled = torch.stack([part.mean(0) for part in vectors.split(list(counts))])
        scores: Tensor = self.head(pooled)
        return scores


@dataclass
class Finetuned:
    """A trained classifier and how it went.

    Attributes:
        model: With the best epoch's weights.
        trainable: Number of parameters of the backbone that learned.
        history: For each look at validation: epoch, training loss, validation score.
        chosen: What validation chose.
    """

    model: Classifier
    machine: Machine
    trainable: int
    history: list[dict[str, float]] = field(default_factory=list)
    chosen: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def probabilities(self, cases: Sequence[Case], bank: ImageBank, kind: TaskKind, batch_size: int = 32) -> Probabilities:
        """Return class probabilities [n, classes]; images are not augmented."""
        self.model.eval()
        parts = []
        for start in range(0, len(cases), batch_size):
            images = [bank(case) for case in cases[start : start + batch_size]]
            with self.machine.autocast():
                scores = self.model(torch.cat(images).to(self.machine.device), [len(one) for one in images])
            parts.append(class_probabilities(scores.float().cpu(), kind))
        return np.concatenate(parts)


def finetune(
    backbone: Backbone,
    train: Sequence[Case],
    val: Sequence[Case],
    *,
    mode: Adaptation,
    config: FinetuneConfig,
    kind: TaskKind,
    outputs: int,
    metric: str,
    bank: ImageBank,
    machine: Machine,
    seed: int,
) -> Finetuned:
    """Train a fresh copy of a backbone with a head.

    Args:
        backbone: Is copied; stays as it is.
        train: Cases to learn from.
        val: Cases that choose the epoch.
        mode: What learns; see `adaptation.adapt`.
        config: Lengths and learning rates.
        kind: Kind of task.
        outputs: Classes or labels.
        metric: For the choice.
        bank: Reads images.
        machine: Where to compute.
        seed: Of head, order and LoRA.

    Raises:
        RuntimeError: Something held has changed, or something that learns has not moved: a fault of this program.
    """
    own = copy.deepcopy(backbone)
    adapt(own, mode, config, derive_seed(seed, "lora") % 2**32)
    model = Classifier(own, outputs, torch_rng(seed, "head")).to(machine.device)
    held_before = {name: _digest(tensor) for name, tensor in held_tensors(own)}
    start = {name: tensor.detach().clone() for name, tensor in own.named_parameters() if tensor.requires_grad}
    result = Finetuned(model, machine, sum(tensor.numel() for tensor in start.values()))
    touched = _train(model, train, val, result, mode=mode, config=config, kind=kind, metric=metric, bank=bank, seed=seed)
    changed = [name for name, tensor in held_tensors(own) if held_before[name] != _digest(tensor)]
    if changed:
        raise RuntimeError(f"protocol {mode}: held tensors changed: {', '.join(changed[:5])}")
    still = [name for name in touched if torch.equal(start[name], touched[name])]
    if len(still) == len(touched) or not touched:
        raise RuntimeError(f"protocol {mode}: nothing of the backbone moved ({len(start)} tensors should have)")
    return result


def _train(
    model: Classifier,
    train: Sequence[Case],
    val: Sequence[Case],
    result: Finetuned,
    *,
    mode: Adaptation,
    config: FinetuneConfig,
    kind: TaskKind,
    metric: str,
    bank: ImageBank,
    seed: int,
) -> dict[str, Tensor]:
    """Run all epochs, put the best one's weights back; return the tensors that had a gradient as the last epoch left them."""
    labels, val_labels = torch.from_numpy(labels_array(list(train))), labels_array(list(val))
    steps_an_epoch = -(-len(train) // config.batch_size)
    epochs = max(config.epochs, -(-config.min_steps // steps_an_epoch))
    learning_rate = config.backbone_lr if mode in ("finetune", "partial") else config.adapter_lr
    learns = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    groups = [{"params": learns, "lr": learning_rate}, {"params": list(model.head.parameters()), "lr": config.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_an_epoch)
    best, best_score, with_gradient = _snapshot(model), -math.inf, set[str]()
    for epoch in range(epochs):
        set_training_mode(model.backbone)
        torch.manual_seed(derive_seed(seed, "dropout", epoch) % 2**63)  # LoRA's dropout draws from torch's own generator
        losses = []
        for number, batch in enumerate(_epoch_batches(len(train), config.batch_size, seed, epoch)):
            images = [_augmented(bank(train[int(place)]), config.flip, seed, epoch, int(place)) for place in batch]
            with result.machine.autocast():
                scores = model(torch.cat(images).to(result.machine.device), [len(one) for one in images])
            loss = class_loss(scores.float(), labels[torch.from_numpy(batch)].to(scores.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if epoch == 0 and number == 0:
                with_gradient = {name for name, one in model.backbone.named_parameters() if one.grad is not None}
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))
        if (epoch + 1) % config.eval_every and epoch + 1 < epochs:
            continue
        score = selection_score(kind, val_labels, result.probabilities(val, bank, kind, config.batch_size), metric)
        result.history.append({"epoch": epoch + 1, "loss": float(np.mean(losses)), "val_score": score})
        if score > best_score:
            best, best_score = _snapshot(model), score
            result.chosen = {"epoch": epoch + 1, "val_score": score}
    last = {name: one.detach().clone() for name, one in model.backbone.named_parameters() if name in with_gradient}
    model.load_state_dict(best, strict=False)
    model.eval()
    return last


def _snapshot(model: Classifier) -> dict[str, Tensor]:
    """Copy what may change: parameters that learn and buffers."""
    learns = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    saved = model.state_dict()
    return learns | {name: saved[name].clone() for name, _ in model.named_buffers() if name in saved}


def _epoch_batches(cases: int, size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    order = numpy_rng(derive_seed(seed, "order"), epoch).permutation(cases)
    parts = np.split(order, range(size, cases, size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        # One single case has no batch statistics: it joins the batch before.
        parts[-2:] = [np.concatenate(parts[-2:])]
    return parts


def _augmented(images: Tensor, flip: bool, seed: int, epoch: int, place: int) -> Tensor:
    if flip and numpy_rng(seed, "flip", epoch, place).random() < 0.5:
        return images.flip(-1)
    return images


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    return hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
