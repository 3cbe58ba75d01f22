"""The protocols by name: each chooses on validation and returns something that can predict; none sees the test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.device import Machine
from meddino.core.errors import ConfigError
from meddino_evaluation.adaptation.features import FeatureTable, joined
from meddino_evaluation.adaptation.finetune import ImageBank, finetune
from meddino_evaluation.adaptation.heads import HeadPlan, Schedule, train_heads
from meddino_evaluation.adaptation.knn import knn_probabilities, ml_knn_probabilities
from meddino_evaluation.adaptation.logistic import fit_logistic
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.classification.datasets import Case, labels_array
from meddino_evaluation.classification.evaluation_config import MlpConfig, ProtocolName, RepresentationConfig
from meddino_evaluation.metrics.classification import METRICS, TaskKind, selection_score

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """One part of a split: its cases and their frozen features."""

    cases: tuple[Case, ...]
    table: FeatureTable

    @property
    def labels(self) -> NDArray[np.int64]:
        """[n] or [n, labels]."""
        return labels_array(self.cases)

    def subset(self, places: Sequence[int]) -> "Part":
        """Return some of the cases."""
        return Part(tuple(self.cases[place] for place in places), self.table.subset(places))


@dataclass(frozen=True)
class Lesson:
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
    config: RepresentationConfig
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
class Learned:
    """What a protocol returns.

    Attributes:
        predict: From a part to class probabilities.
        chosen: What validation chose, and its score.
        candidates: How many were compared.
    """

    predict: Callable[[Part], Probabilities]
    chosen: dict[str, Any]
    candidates: int


def learn(protocol: ProtocolName, lesson: Lesson) -> Learned:
    """Run a protocol on train and val."""
    return PROTOCOLS[protocol](lesson)


def check_selection(config: RepresentationConfig, kind: TaskKind) -> None:
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


def _knn(lesson: Lesson) -> Learned:
    config, pooling = lesson.config.knn, lesson.config.features.pooling
    neighbours = sorted({min(k, len(lesson.train.cases)) for k in config.neighbours})
    if lesson.kind == "multilabel":
        return _ml_knn(lesson, neighbours)

    def votes(part: Part, gallery: Part, ks: Sequence[int]) -> dict[int, Probabilities]:
        return knn_probabilities(
            gallery.table.vectors(pooling=pooling),
            gallery.labels,
            part.table.vectors(pooling=pooling),
            classes=len(lesson.classes),
            neighbours=ks,
            temperature=config.temperature,
        )

    on_val = votes(lesson.val, lesson.train, neighbours)
    scores = [lesson.score(on_val[k]) for k in neighbours]
    best = neighbours[_best(scores)]
    gallery = lesson.everything
    return Learned(lambda part: votes(part, gallery, [best])[best], {"k": best, "val_score": max(scores)}, len(neighbours))


def _ml_knn(lesson: Lesson, neighbours: Sequence[int]) -> Learned:
    pooling = lesson.config.features.pooling

    def predict(part: Part, gallery: Part, k: int) -> Probabilities:
        return ml_knn_probabilities(
            gallery.table.vectors(pooling=pooling),
            gallery.labels,
            part.table.vectors(pooling=pooling),
            neighbours=k,
            smoothing=lesson.config.knn.smoothing,
        )

    scores = [lesson.score(predict(lesson.val, lesson.train, k)) for k in neighbours]
    best, gallery = neighbours[_best(scores)], lesson.everything
    return Learned(lambda part: predict(part, gallery, best), {"k": best, "val_score": max(scores)}, len(neighbours))


def _logistic(lesson: Lesson) -> Learned:
    config, pooling = lesson.config.logistic, lesson.config.features.pooling
    strengths = np.logspace(config.lowest_exponent, config.highest_exponent, config.values).tolist()
    options: dict[str, Any] = {"kind": lesson.kind, "classes": len(lesson.classes), "max_steps": config.max_steps}

    def features(part: Part) -> NDArray[np.float64]:
        return part.table.vectors(pooling=pooling).double().numpy()

    fitted = fit_logistic(features(lesson.train), lesson.train.labels, strengths, **options)
    scores = [lesson.score(one.probabilities(features(lesson.val), lesson.kind)) for one in fitted]
    place = _best(scores)
    final = fitted[place]
    if lesson.refit:
        final = fit_logistic(features(lesson.everything), lesson.everything.labels, [strengths[place]], **options)[0]
    chosen = {"C": strengths[place], "val_score": scores[place]}
    return Learned(lambda part: final.probabilities(features(part), lesson.kind), chosen, len(strengths))


def _heads(lesson: Lesson, plans: Sequence[HeadPlan], schedule: Schedule) -> Learned:
    pooling = lesson.config.features.pooling
    options: dict[str, Any] = {"outputs": len(lesson.classes), "seed": lesson.seed, "pooling": pooling}
    heads = train_heads(lesson.train.table, lesson.train.labels, plans, schedule, **options)
    scores = [lesson.score(head.probabilities(lesson.val.table, lesson.kind, pooling)) for head in heads]
    place = _best(scores)
    final = heads[place]
    if lesson.refit:
        final = train_heads(lesson.everything.table, lesson.everything.labels, [plans[place]], schedule, **options)[0]
    chosen = {"head": plans[place].name, "val_score": scores[place]}
    return Learned(lambda part: final.probabilities(part.table, lesson.kind, pooling), chosen, len(plans))


def _linear(lesson: Lesson) -> Learned:
    config = lesson.config.linear
    plans = [
        HeadPlan(rate, blocks, pool)
        for rate in config.learning_rates
        for blocks in config.last_blocks
        for pool in config.average_pool
    ]
    schedule = Schedule(config.epochs, config.min_steps, config.batch_size, momentum=config.momentum, init_std=config.init_std)
    return _heads(lesson, plans, schedule)


def _mlp_schedule(config: MlpConfig) -> Schedule:
    return Schedule(
        config.epochs,
        config.min_steps,
        config.batch_size,
        optimizer="adamw",
        weight_decay=config.weight_decay,
        dropout=config.dropout,
    )


def _mlp(lesson: Lesson) -> Learned:
    config = lesson.config.mlp
    plans = [HeadPlan(rate, hidden_dim=width) for rate in config.learning_rates for width in config.hidden_dims]
    return _heads(lesson, plans, _mlp_schedule(config))


def _attention(lesson: Lesson) -> Learned:
    config = lesson.config.mlp
    plans = [HeadPlan(rate, attention=True) for rate in config.learning_rates]
    return _heads(lesson, plans, _mlp_schedule(config))


def _finetune(mode: Any) -> Callable[[Lesson], Learned]:
    def run(lesson: Lesson) -> Learned:
        tuned = finetune(
            lesson.backbone,
            lesson.train.cases,
            lesson.val.cases,
            mode=mode,
            config=lesson.config.finetune,
            kind=lesson.kind,
            outputs=len(lesson.classes),
            metric=lesson.metric,
            bank=lesson.bank,
            machine=lesson.machine,
            seed=lesson.seed,
        )
        chosen = {**tuned.chosen, "trainable_parameters": tuned.trainable}
        batch = lesson.config.finetune.batch_size
        return Learned(
            lambda part: tuned.probabilities(part.cases, lesson.bank, lesson.kind, batch), chosen, len(tuned.history)
        )

    return run


PROTOCOLS: dict[ProtocolName, Callable[[Lesson], Learned]] = {
    "knn": _knn,
    "logistic": _logistic,
    "linear": _linear,
    "mlp": _mlp,
    "attention": _attention,
    "finetune": _finetune("finetune"),
    "partial": _finetune("partial"),
    "lora": _finetune("lora"),
    "bitfit": _finetune("bitfit"),
}


def smaller(lesson: Lesson, places: Sequence[int], seed: int) -> Lesson:
    """Return a lesson on some of the training cases, without a refit: validation is for choosing only."""
    return replace(lesson, train=lesson.train.subset(places), refit=False, seed=seed)
