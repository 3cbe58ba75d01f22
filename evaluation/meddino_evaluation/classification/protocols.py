"""The protocols by name: each chooses on validation and returns something that can predict; none sees the test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.device import Machine
from meddino.core.errors import ConfigError
from meddino_evaluation.adaptation.config import MlpConfig, ProtocolName
from meddino_evaluation.adaptation.features import FeatureTable, joined
from meddino_evaluation.adaptation.finetune import ImageBank, finetune
from meddino_evaluation.adaptation.heads import HeadPlan, Schedule, train_heads
from meddino_evaluation.adaptation.knn import knn_probabilities, ml_knn_probabilities
from meddino_evaluation.adaptation.logistic import fit_logistic
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.classification.config import ClassificationConfig
from meddino_evaluation.data.case import ClassCase, labels_array
from meddino_evaluation.metrics.classification import METRICS, TaskKind, selection_score

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """One part of a split: its cases and their frozen features."""

    cases: tuple[ClassCase, ...]
    table: FeatureTable

    @property
    def labels(self) -> NDArray[np.int64]:
        """[n] or [n, labels]."""
        return labels_array(self.cases)

    def subset(self, places: Sequence[int]) -> "Part":
        """Return some of the cases."""
        return Part(tuple(self.cases[place] for place in places), self.table.subset(places))


@dataclass(frozen=True)
class TaskData:
    """What a protocol may look at.

    Attributes:
        train: Cases to learn from.
        val: Cases to choose by.
        refit: Learn once more from train and val together, with what was chosen, as S0 does; never in few-shot.
        kind: Kind of task.
        classes: Names.
        config: All settings.
        seed: Of this repeat or draw.
        backbone: For protocols that train it; they copy it.
        bank: Reads images.
        machine: Where to compute.
    """

    train: Part
    val: Part
    refit: bool
    kind: TaskKind
    classes: tuple[str, ...]
    config: ClassificationConfig
    seed: int
    backbone: Backbone
    bank: ImageBank
    machine: Machine

    @property
    def metric(self) -> str:
        """The metric by which anything is chosen."""
        name = self.config.statistics.selection
        if name == "auto":
            return "kappa" if self.kind == "ordinal" else "auroc"
        return name

    @property
    def everything(self) -> Part:
        """Train and val together if `refit`, else train."""
        if not self.refit:
            return self.train
        return Part(self.train.cases + self.val.cases, joined(self.train.table, self.val.table))

    def score(self, probabilities: Probabilities) -> float:
        """Return how good predictions for the validation cases are; higher is better."""
        return selection_score(self.kind, self.val.labels, probabilities, self.metric)


@dataclass(frozen=True)
class FittedModel:
    """What a protocol returns.

    Attributes:
        predict: From a part to class probabilities.
        chosen: What validation chose, and its score.
        candidates: How many were compared.
    """

    predict: Callable[[Part], Probabilities]
    chosen: dict[str, Any]
    candidates: int


def learn(protocol: ProtocolName, task: TaskData) -> FittedModel:
    """Run a protocol on train and val."""
    return PROTOCOLS[protocol](task)


def check_selection(config: ClassificationConfig, kind: TaskKind) -> None:
    """Refuse a selection metric that the task does not have.

    Raises:
        ConfigError: Names those it has.
    """
    name = config.statistics.selection
    if name != "auto" and name not in METRICS[kind]:
        raise ConfigError(
            f"statistics.selection '{name}' is no metric of a {kind} task; allowed: auto, {', '.join(METRICS[kind])}"
        )


def _best(scores: Sequence[float]) -> int:
    return int(np.argmax(scores))  # the first of equals: smaller k, smaller C, smaller learning rate


def _knn(task: TaskData) -> FittedModel:
    config, pooling = task.config.knn, task.config.features.pooling
    neighbours = sorted({min(k, len(task.train.cases)) for k in config.neighbours})
    if task.kind == "multilabel":
        return _ml_knn(task, neighbours)

    def votes(part: Part, gallery: Part, ks: Sequence[int]) -> dict[int, Probabilities]:
        return knn_probabilities(
            gallery.table.vectors(pooling=pooling),
            gallery.labels,
            part.table.vectors(pooling=pooling),
            classes=len(task.classes),
            neighbours=ks,
            temperature=config.temperature,
        )

    on_val = votes(task.val, task.train, neighbours)
    scores = [task.score(on_val[k]) for k in neighbours]
    best = neighbours[_best(scores)]
    gallery = task.everything
    return FittedModel(lambda part: votes(part, gallery, [best])[best], {"k": best, "val_score": max(scores)}, len(neighbours))


def _ml_knn(task: TaskData, neighbours: Sequence[int]) -> FittedModel:
    pooling = task.config.features.pooling

    def predict(part: Part, gallery: Part, k: int) -> Probabilities:
        return ml_knn_probabilities(
            gallery.table.vectors(pooling=pooling),
            gallery.labels,
            part.table.vectors(pooling=pooling),
            neighbours=k,
            smoothing=task.config.knn.smoothing,
        )

    scores = [task.score(predict(task.val, task.train, k)) for k in neighbours]
    best, gallery = neighbours[_best(scores)], task.everything
    return FittedModel(lambda part: predict(part, gallery, best), {"k": best, "val_score": max(scores)}, len(neighbours))


def _logistic(task: TaskData) -> FittedModel:
    config, pooling = task.config.logistic, task.config.features.pooling
    strengths = np.logspace(config.lowest_exponent, config.highest_exponent, config.values).tolist()
    options: dict[str, Any] = {"kind": task.kind, "classes": len(task.classes), "max_steps": config.max_steps}

    def features(part: Part) -> NDArray[np.float64]:
        return part.table.vectors(pooling=pooling).double().numpy()

    fitted = fit_logistic(features(task.train), task.train.labels, strengths, **options)
    scores = [task.score(one.probabilities(features(task.val), task.kind)) for one in fitted]
    place = _best(scores)
    final = fitted[place]
    if task.refit:
        final = fit_logistic(features(task.everything), task.everything.labels, [strengths[place]], **options)[0]
    chosen = {"C": strengths[place], "val_score": scores[place]}
    return FittedModel(lambda part: final.probabilities(features(part), task.kind), chosen, len(strengths))


def _heads(task: TaskData, plans: Sequence[HeadPlan], schedule: Schedule) -> FittedModel:
    pooling = task.config.features.pooling
    options: dict[str, Any] = {"outputs": len(task.classes), "seed": task.seed, "pooling": pooling}
    heads = train_heads(task.train.table, task.train.labels, plans, schedule, **options)
    scores = [task.score(head.probabilities(task.val.table, task.kind, pooling)) for head in heads]
    place = _best(scores)
    final = heads[place]
    if task.refit:
        final = train_heads(task.everything.table, task.everything.labels, [plans[place]], schedule, **options)[0]
    chosen = {"head": plans[place].name, "val_score": scores[place]}
    return FittedModel(lambda part: final.probabilities(part.table, task.kind, pooling), chosen, len(plans))


def _linear(task: TaskData) -> FittedModel:
    config = task.config.linear
    plans = [
        HeadPlan(rate, blocks, pool)
        for rate in config.learning_rates
        for blocks in config.last_blocks
        for pool in config.average_pool
    ]
    schedule = Schedule(
        config.epochs,
        config.min_steps,
        config.batch_size,
        optimizer=config.optimizer,
        momentum=config.momentum,
        init_std=config.init_std,
    )
    return _heads(task, plans, schedule)


def _mlp_schedule(config: MlpConfig) -> Schedule:
    return Schedule(
        config.epochs,
        config.min_steps,
        config.batch_size,
        optimizer="adamw",
        weight_decay=config.weight_decay,
        dropout=config.dropout,
    )


def _mlp(task: TaskData) -> FittedModel:
    config = task.config.mlp
    plans = [HeadPlan(rate, hidden_dim=width) for rate in config.learning_rates for width in config.hidden_dims]
    return _heads(task, plans, _mlp_schedule(config))


def _attention(task: TaskData) -> FittedModel:
    config = task.config.mlp
    plans = [HeadPlan(rate, attention=True) for rate in config.learning_rates]
    return _heads(task, plans, _mlp_schedule(config))


def _finetune(mode: Any, layers: int = 1) -> Callable[[TaskData], FittedModel]:
    def run(task: TaskData) -> FittedModel:
        tuned = finetune(
            task.backbone,
            task.train.cases,
            task.val.cases,
            mode=mode,
            config=task.config.finetune,
            kind=task.kind,
            outputs=len(task.classes),
            metric=task.metric,
            bank=task.bank,
            machine=task.machine,
            seed=task.seed,
            hidden_dim=task.config.finetune.hidden_dim if layers == 2 else 0,
        )
        chosen = {**tuned.chosen, "trainable_parameters": tuned.trainable}
        batch = task.config.finetune.batch_size
        return FittedModel(
            lambda part: tuned.probabilities(part.cases, task.bank, task.kind, batch), chosen, len(tuned.history)
        )

    return run


PROTOCOLS: dict[ProtocolName, Callable[[TaskData], FittedModel]] = {
    "knn": _knn,
    "logistic": _logistic,
    "linear": _linear,
    "mlp": _mlp,
    "attention": _attention,
    "finetune": _finetune("finetune"),
    "finetune_mlp": _finetune("finetune", layers=2),
    "partial": _finetune("partial"),
    "lora": _finetune("lora"),
    "bitfit": _finetune("bitfit"),
}


def smaller(task: TaskData, places: Sequence[int], seed: int) -> TaskData:
    """Return a task on some of the training cases, without a refit: validation is for choosing only."""
    return replace(task, train=task.train.subset(places), refit=False, seed=seed)
