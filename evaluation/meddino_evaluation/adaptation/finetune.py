"""Training through the backbone: end to end, partly, LoRA, BitFit. Validation chooses the epoch; the test is not seen."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meddino.core.device import Machine
from meddino.core.seeds import derive_seed, numpy_rng, torch_rng
from meddino_evaluation.adaptation.config import FinetuneConfig
from meddino_evaluation.adaptation.features import Transform, model_input, read_case
from meddino_evaluation.adaptation.fitting import (
    BestCheckpoint,
    FitLoop,
    FreezeCheck,
    StepRecord,
    cosine_decay,
    learned_state,
)
from meddino_evaluation.adaptation.heads import Probabilities, class_loss, class_probabilities
from meddino_evaluation.adaptation.trainable import Adaptation, adapt, set_training_mode
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.data.case import ClassCase, labels_array
from meddino_evaluation.metrics.classification import TaskKind, selection_score

_BANK_BYTES = 2**31


class ImageBank:
    """Model inputs of cases, kept in memory as far as two GiB go, read again beyond that."""

    def __init__(self, backbone: Backbone, transform: Transform) -> None:
        self.backbone = backbone
        self.transform = transform
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0

    def __call__(self, case: ClassCase) -> Tensor:
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
    """A backbone and a head of one or two layers on its CLS-like vector, averaged over the real slices of a volume."""

    def __init__(self, backbone: Backbone, outputs: int, rng: torch.Generator, hidden_dim: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        first, last = nn.Linear(backbone.embed_dim, hidden_dim), nn.Linear(hidden_dim or backbone.embed_dim, outputs)
        self.head: nn.Module = nn.Sequential(first, nn.GELU(), last) if hidden_dim else last
        with torch.no_grad():
            if hidden_dim:
                first.weight.normal_(0.0, backbone.embed_dim**-0.5, generator=rng)
                first.bias.zero_()
            last.weight.normal_(0.0, 0.01, generator=rng)
            last.bias.zero_()

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
    def probabilities(self, cases: Sequence[ClassCase], bank: ImageBank, kind: TaskKind, batch_size: int = 32) -> Probabilities:
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
    train: Sequence[ClassCase],
    val: Sequence[ClassCase],
    *,
    mode: Adaptation,
    config: FinetuneConfig,
    kind: TaskKind,
    outputs: int,
    metric: str,
    bank: ImageBank,
    machine: Machine,
    seed: int,
    hidden_dim: int = 0,
) -> Finetuned:
    """Train a fresh copy of a backbone with a head; the epoch that validation likes best is kept.

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
        hidden_dim: Width of the head's hidden layer; 0: it has none.
    """
    own = copy.deepcopy(backbone)
    adapt(own, mode, config, derive_seed(seed, "lora") % 2**32)
    model = Classifier(own, outputs, torch_rng(seed, "head"), hidden_dim).to(machine.device)
    result = Finetuned(model, machine, sum(one.numel() for one in own.parameters() if one.requires_grad))
    freeze, best = FreezeCheck(own, {"backbone": own}), BestCheckpoint(lambda: learned_state(model), model)
    val_labels, losses = labels_array(list(val)), list[float]()
    per_epoch = len(epoch_batches(len(train), config.batch_size, seed, 0))
    epochs = max(config.epochs, -(-config.min_steps // -(-len(train) // config.batch_size)))

    def on_step(record: StepRecord) -> bool:
        losses.append(record.loss)
        epoch, rest = divmod(record.step + 1, per_epoch)
        if not rest and (epoch % config.eval_every == 0 or epoch == epochs):
            score = selection_score(kind, val_labels, result.probabilities(val, bank, kind, config.batch_size), metric)
            result.history.append({"epoch": epoch, "loss": float(np.mean(losses[-per_epoch:])), "val_score": score})
            if score > -math.inf and best.update(score):
                result.chosen = {"epoch": epoch, "val_score": score}
        return True

    _loop(model, train, epochs, per_epoch, mode=mode, config=config, bank=bank, machine=machine, seed=seed).fit(on_step)
    freeze.check(mode)
    best.restore()
    model.eval()
    return result


def _loop(
    model: Classifier,
    train: Sequence[ClassCase],
    epochs: int,
    per_epoch: int,
    *,
    mode: Adaptation,
    config: FinetuneConfig,
    bank: ImageBank,
    machine: Machine,
    seed: int,
) -> FitLoop:
    labels = torch.from_numpy(labels_array(list(train)))
    learning_rate = config.backbone_lr if mode in ("finetune", "partial") else config.adapter_lr
    learns = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    groups = [{"params": learns, "lr": learning_rate}, {"params": list(model.head.parameters()), "lr": config.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)

    def loss_of(step: int) -> Tensor:
        epoch, number = divmod(step, per_epoch)
        if number == 0:
            set_training_mode(model.backbone)
            torch.manual_seed(derive_seed(seed, "dropout", epoch) % 2**63)  # LoRA's dropout draws from torch's own generator
        batch = epoch_batches(len(train), config.batch_size, seed, epoch)[number]
        images = [_augmented(bank(train[int(place)]), config.flip, seed, epoch, int(place)) for place in batch]
        with machine.autocast():
            scores = model(torch.cat(images).to(machine.device), [len(one) for one in images])
        return class_loss(scores.float(), labels[torch.from_numpy(batch)].to(scores.device))

    rates = cosine_decay(optimizer, epochs * -(-len(train) // config.batch_size))
    return FitLoop(model, optimizer, rates, loss_of, epochs * per_epoch)


def epoch_batches(cases: int, size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Return the places of the cases of each batch of an epoch, in an order of its own."""
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
