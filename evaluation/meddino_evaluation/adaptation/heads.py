"""Many heads trained in one pass over frozen features, each exactly as if it were trained alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from meddino.core.seeds import derive_seed, numpy_rng, torch_rng
from meddino_evaluation.adaptation.features import FeatureTable
from meddino_evaluation.adaptation.fitting import FitLoop, cosine_decay
from meddino_evaluation.metrics.classification import TaskKind

Truth = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class HeadPlan:
    """One head of the grid.

    Attributes:
        learning_rate: Its own.
        last_blocks: CLS of so many last blocks are its input.
        average_pool: The mean patch token is appended.
        hidden_dim: 0 for a linear head.
        attention: Slices are pooled by learned attention instead of the mean.
    """

    learning_rate: float
    last_blocks: int = 1
    average_pool: bool = False
    hidden_dim: int = 0
    attention: bool = False

    @property
    def name(self) -> str:
        """Short and unique; also what the head's first weights are drawn for."""
        kind = "attention" if self.attention else f"mlp{self.hidden_dim}" if self.hidden_dim else "linear"
        return f"{kind} lr={self.learning_rate:g} blocks={self.last_blocks} pool={'yes' if self.average_pool else 'no'}"

    @property
    def source(self) -> tuple[int, bool, bool]:
        """What of the features it reads: heads of one source share their input."""
        return self.last_blocks, self.average_pool, self.attention


@dataclass(frozen=True)
class Schedule:
    """How long and how heads are trained.

    Attributes:
        epochs: Passes over the training cases.
        min_steps: But at least so many optimizer steps.
        batch_size: Cases a step.
        optimizer: "sgd" or "adamw".
        momentum: Of SGD.
        weight_decay: Of AdamW.
        dropout: Before the last layer of heads with a hidden layer.
        init_std: Of the linear weights.
    """

    epochs: int
    min_steps: int
    batch_size: int
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    dropout: float = 0.0
    init_std: float = 0.01

    def steps(self, cases: int) -> int:
        """Return the number of optimizer steps for so many cases."""
        return max(self.min_steps, self.epochs * -(-cases // self.batch_size))


class Head(nn.Module):
    """Slices to class scores: pooled over the real slices, perhaps a hidden layer, a linear layer."""

    def __init__(self, dim: int, outputs: int, plan: HeadPlan, schedule: Schedule, rng: torch.Generator) -> None:
        super().__init__()
        self.attention = nn.ModuleList([nn.Linear(dim, 64), nn.Linear(dim, 64), nn.Linear(64, 1)]) if plan.attention else None
        self.hidden = nn.Linear(dim, plan.hidden_dim) if plan.hidden_dim else None
        self.last = nn.Linear(plan.hidden_dim or dim, outputs)
        self.dropout = schedule.dropout if plan.hidden_dim else 0.0
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    std = schedule.init_std if module is self.last else module.in_features**-0.5
                    module.weight.normal_(0.0, std, generator=rng)
                    module.bias.zero_()

    def forward(
        self, bags: Float[Tensor, "batch slices dim"], real: Bool[Tensor, "batch slices"], keep: Tensor | None = None
    ) -> Float[Tensor, "batch outputs"]:
        """Return class scores.

        Args:
            bags: Features of each case's slices, padded.
            real: False for padding, which has no influence.
            keep: Dropout's mask for the hidden layer, already divided by the share kept; None in evaluation.
        """
        if self.attention is not None:
            # Gated attention (Ilse et al. 2018): padding gets no weight.
            score = self.attention[2](torch.tanh(self.attention[0](bags)) * torch.sigmoid(self.attention[1](bags))).squeeze(-1)
            weight = score.masked_fill(~real, -torch.inf).softmax(1)
        else:
            weight = real / real.sum(1, keepdim=True)
        pooled = (bags.masked_fill(~real[..., None], 0.0) * weight[..., None]).sum(1)
        if self.hidden is not None:
            pooled = functional.gelu(self.hidden(pooled))
            pooled = pooled if keep is None else pooled * keep
        scores: Tensor = self.last(pooled)
        return scores


def class_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy for class numbers [n], or binary cross-entropy over known labels [n, labels]."""
    if labels.ndim == 1:
        return functional.cross_entropy(scores, labels)
    known = labels != -1
    loss = functional.binary_cross_entropy_with_logits(scores, (labels == 1).to(scores.dtype), reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


def class_probabilities(scores: Tensor, kind: TaskKind) -> Probabilities:
    """Return probabilities as `classification_metrics` wants them."""
    result: Probabilities = (scores.double().sigmoid() if kind == "multilabel" else scores.double().softmax(1)).numpy()
    return result


@dataclass
class TrainedHead:
    """A head with the scaling of its input."""

    plan: HeadPlan
    head: Head
    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def probabilities(self, table: FeatureTable, kind: TaskKind, pooling: str) -> Probabilities:
        """Return class probabilities [n, classes] for some cases."""
        bags, real = padded_bags(table, self.plan, pooling)
        self.head.eval()
        return class_probabilities(self.head((bags - self.mean) / self.std, real), kind)


def padded_bags(table: FeatureTable, plan: HeadPlan, pooling: str) -> tuple[Tensor, Tensor]:
    """Return a head's input [n, slices, D] and where it is real [n, slices].

    Without attention a volume is pooled beforehand ("mean" or "max" over its real slices), so there is one slice.
    """
    if not plan.attention:
        vectors = table.vectors(plan.last_blocks, plan.average_pool, pooling)[:, None]
        return vectors, torch.ones(vectors.shape[:2], dtype=torch.bool)
    bags = table.bags(plan.last_blocks, plan.average_pool)
    padded = nn.utils.rnn.pad_sequence(bags, batch_first=True)
    counts = torch.tensor([len(bag) for bag in bags])
    return padded, torch.arange(padded.shape[1])[None] < counts[:, None]


def train_heads(
    table: FeatureTable,
    labels: Truth,
    plans: Sequence[HeadPlan],
    schedule: Schedule,
    *,
    outputs: int,
    seed: int,
    pooling: str = "mean",
) -> list[TrainedHead]:
    """Train all heads in one pass: the same batches for all, each with its own rate, schedule and first weights.

    A head's result does not depend on which other heads are trained beside it. Inputs are scaled by the training cases'
    mean and standard deviation; learning rates follow a cosine to 0.

    Args:
        table: Features of the training cases.
        labels: See `classification_metrics`.
        plans: The heads.
        schedule: How long and how.
        outputs: Classes or labels.
        seed: Of first weights, order and dropout.
        pooling: For heads without attention: "mean" or "max" over slices.
    """
    truth, inputs = torch.from_numpy(labels), {}
    for plan in plans:
        if plan.source not in inputs:
            inputs[plan.source] = _scaled(*padded_bags(table, plan, pooling))
    heads = []
    for plan in plans:
        bags, _, mean, std = inputs[plan.source]
        head = Head(bags.shape[-1], outputs, plan, schedule, torch_rng(seed, "head", plan.name))
        heads.append(TrainedHead(plan, head.train(), mean, std))
    steps = schedule.steps(len(table.ids))
    batches = _batches(len(table.ids), schedule.batch_size, steps, seed)

    def loss_of(step: int) -> Tensor:
        losses, batch = [], batches[step]
        for trained in heads:
            plan = trained.plan
            bags, real, _, _ = inputs[plan.source]
            keep = None
            if trained.head.dropout:
                rng = torch_rng(seed, "dropout", plan.name, step)
                share = 1 - trained.head.dropout
                keep = torch.bernoulli(torch.full((len(batch), plan.hidden_dim), share), generator=rng) / share
            losses.append(class_loss(trained.head(bags[batch], real[batch], keep), truth[batch]))
        return torch.stack(losses).sum()  # no parameter is in two of them: each head gets its own gradient

    optimizer = _optimizer(heads, schedule)
    # A rate of the grid at which a head diverges loses the selection; the others go on.
    module = nn.ModuleList(one.head for one in heads)
    FitLoop(module, optimizer, cosine_decay(optimizer, steps), loss_of, steps, only_finite=False).fit()
    return heads


def _scaled(bags: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return bags scaled by mean and standard deviation over the real slices, where they are real, and both."""
    flat = bags[real]
    mean = flat.mean(0)
    # One case, or a constant feature, has no spread: it is left as it is.
    std = flat.std(0, unbiased=False) if len(flat) > 1 else torch.ones_like(mean)
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return (bags - mean) / std, real, mean, std


def _optimizer(heads: Sequence[TrainedHead], schedule: Schedule) -> torch.optim.Optimizer:
    groups = [{"params": list(one.head.parameters()), "lr": one.plan.learning_rate} for one in heads]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=schedule.momentum)
    return torch.optim.AdamW(groups, weight_decay=schedule.weight_decay)


def _batches(cases: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Return the cases of every step: each epoch its own order, the last batch of an epoch may be smaller."""
    batches: list[Tensor] = []
    epoch = 0
    while len(batches) < steps:
        order = numpy_rng(derive_seed(seed, "order"), epoch).permutation(cases)
        batches += [torch.from_numpy(part) for part in np.split(order, range(size, cases, size))]
        epoch += 1
    return batches[:steps]
