"""What the numbers of a run mean, in words: rules over metrics.jsonl. No rule knows a label."""

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meddino_pretrain.methods.config import Terms
from meddino_pretrain.monitoring.config import DiagnosisConfig

Record = Mapping[str, Any]
# A begun run keeps its schedules: they cannot be changed under it.
NEW_RUN = "Begin a new run (another --out; init.weights takes one of this run's checkpoints)"


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Attributes:
        name: The rule: one of `RULES`.
        severity: logging.WARNING if the run will come to nothing as it is; logging.INFO if it is worth knowing.
        step: The newest step it rests on.
        message: What is seen, with numbers, and what to do.
    """

    name: str
    severity: int
    step: int
    message: str


@dataclass(frozen=True)
class Run:
    """What the rules go by.

    Attributes:
        records: One a step, as in metrics.jsonl, in order.
        config: Limits.
        terms: What the method records.
        from_released_weights: True if the backbone began with features worth keeping.
        max_bad_steps: Skipped steps in a row after which the run stops.
    """

    records: Sequence[Record]
    config: DiagnosisConfig
    terms: Terms
    from_released_weights: bool
    max_bad_steps: int

    @property
    def window(self) -> Sequence[Record]:
        """The newest records."""
        return self.records[-self.config.window_steps :]

    def values(self, name: str, records: Sequence[Record] | None = None) -> list[float]:
        """Return a number's values where it was measured and is finite."""
        found = (record.get(name) for record in (self.records if records is None else records))
        return [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]


def findings(
    records: Sequence[Record], config: DiagnosisConfig, *, terms: Terms, from_released_weights: bool, max_bad_steps: int
) -> list[Finding]:
    """Apply every rule to a stage's records so far.

    Args:
        records: One a step, as in metrics.jsonl, in order; older ones may be thinned, rules take `window_steps` together.
        config: Limits.
        terms: What the method records.
        from_released_weights: True if the stage began with features worth keeping; only then is drift an alarm.
        max_bad_steps: Skipped steps in a row after which the run stops.

    Returns:
        What was found, the most severe first; empty if nothing is wrong.
    """
    if not records:
        return []
    run = Run(records, config, terms, from_released_weights, max_bad_steps)
    found = [(name, severity, rule(run)) for name, severity, rule in RULES]
    step = int(records[-1]["step"])
    return [Finding(name, severity, step, message) for name, severity, message in found if message is not None]


def _collapsed(run: Run) -> str | None:
    # Fresh weights give every slice nearly the same CLS token: too little is a collapse where it was more, or after a while.
    late = int(run.records[-1]["step"]) >= run.config.patience_steps
    limits = run.config
    watched = (
        ("cls_rankme", limits.min_rank, "effective rank of the CLS tokens"),
        ("patch_rankme", limits.min_rank, "effective rank of the patch tokens"),
        ("nearest_distance", limits.min_nearest_distance, "distance of a CLS token to its nearest"),
    )
    signs = []
    for name, limit, what in watched:
        values = run.values(f"features/{name}")
        if values and values[-1] < limit and (late or max(values) >= 2 * limit):
            signs.append(f"the {what} is {values[-1]:.3g} (limit {limit:g}, it was up to {max(values):.3g})")
    if not signs:
        return None
    return (
        f"The features have collapsed: {'; '.join(signs)}. {NEW_RUN} with a lower learning rate or a longer warm-up, and "
        f"look at {run.terms.advice}"
    )


def _heads_not_learning(run: Run) -> str | None:
    step = int(run.records[-1]["step"])
    if step < run.config.patience_steps:
        return None
    signs = []
    for term, chance in run.terms.chance.items():
        losses = run.values(term, run.window)
        if losses and (mean := statistics.fmean(losses)) >= run.config.chance_share * chance:
            signs.append(f"{term} is {mean:.3f}, and {chance:.3f} is what a head gives that knows nothing")
    if not signs:
        return None
    ranks = run.values("features/cls_rankme")
    beside = f" Effective rank of the CLS tokens: {ranks[0]:.1f} at first, {ranks[-1]:.1f} now." if ranks else ""
    return (
        f"The heads do not learn: after {step} steps {'; '.join(signs)}. Features may improve all the same, so judge by "
        f"them.{beside} If they stand still too: a higher learning rate, smaller heads or a larger batch"
    )


def _heads_uniform(run: Run) -> str | None:
    size = run.config.window_steps
    if len(run.records) < 2 * size:
        return None
    stuck = [
        term
        for term, chance in run.terms.chance.items()
        if (losses := run.values(term, run.window)) and statistics.fmean(losses) >= run.config.chance_share * chance
    ]
    signs = []
    for name, uniform in run.terms.uniform.items():
        first, now = run.values(name, run.records[:size]), run.values(name, run.window)
        if stuck and first and now and (mean := statistics.fmean(now)) >= run.config.uniform_share * uniform:
            since = next(
                int(record["step"])
                for record in run.records
                if isinstance(record.get(name), float) and record[name] >= run.config.uniform_share * uniform
            )
            signs.append(f"{name} began at {first[0]:.3f} and is {mean:.3f} of at most {uniform:.3f} (so since step {since})")
    if not signs:
        return None
    return (
        f"The heads have gone uniform: {'; '.join(signs)}, while {', '.join(stuck)} stays at chance. "
        f"Their gradient vanishes, and more steps do not mend it. {NEW_RUN}; from scratch with "
        "backbone.changes.layerscale_init=1 (at 1e-5 a fresh CLS token sees nothing of the image), and look at "
        f"{run.terms.advice}"
    )


def _diverging(run: Run) -> str | None:
    size = run.config.window_steps
    losses = run.values("loss")
    skipped = sum(bool(record.get("skipped")) for record in run.window)
    signs = []
    if skipped * 5 >= len(run.window) and skipped > 1:
        signs.append(f"{skipped} of the last {len(run.window)} steps were skipped, their loss or gradient not being finite")
    elif (last := _last_skipped(run.records)) >= run.max_bad_steps:
        signs.append(f"the last {last} steps were skipped, their loss or gradient not being finite")
    if len(losses) >= 3 * size:
        medians = [statistics.median(losses[i : i + size]) for i in range(0, len(losses) - size + 1, size)]
        best, now = min(medians), statistics.median(losses[-size:])
        if now - best > run.config.loss_growth * abs(best):
            signs.append(f"the loss rose from {best:.3f} at its best to {now:.3f}")
    for name in sorted({key for record in run.window for key in record if key.startswith("grad_norm/")}):
        norms = run.values(name)
        if len(norms) >= 3 * size:
            before, now = statistics.median(norms[:-size]), statistics.median(norms[-size:])
            if before > 0 and now > run.config.gradient_growth * before:
                signs.append(f"the gradient norm of {name.removeprefix('grad_norm/')} grew from {before:.3g} to {now:.3g}")
    if not signs:
        return None
    return f"The run is diverging: {'; '.join(signs)}. {NEW_RUN} with a lower learning rate or a longer warm-up"


def _last_skipped(records: Sequence[Record]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda record: bool(record.get("skipped")), reversed(records)))


def _loader_bound(run: Run) -> str | None:
    timing = [record["timing"] for record in run.window if isinstance(record.get("timing"), Mapping)]
    waited, total = (sum(float(entry.get(name) or 0) for entry in timing) for name in ("data_wait_s", "step_s"))
    if len(timing) < 2 or total <= 0 or waited <= run.config.max_data_wait * total:
        return None
    return (
        f"The loader is the limit: {waited / total:.0%} of the last {len(timing)} steps went by waiting for data. "
        "Raise loader.workers, or put the corpus on a faster disk"
    )


def _drifted(run: Run) -> str | None:
    kept, drift = run.values("features/neighbours_kept"), run.values("features/patch_drift")
    if not run.from_released_weights or not kept or not drift:
        return None
    signs = []
    if kept[-1] < run.config.min_neighbours_kept:
        signs.append(f"only {kept[-1]:.0%} of each slice's nearest slices are those of the start")
    if drift[-1] > run.config.max_patch_drift:
        signs.append(f"similarities between patches have changed by {drift[-1]:.2f} on average")
    if not signs:
        return None
    return (
        f"The features have drifted from the weights the run began with: {'; '.join(signs)}. If those were good, begin again "
        "with a longer warm-up of the heads on a frozen backbone and a lower backbone learning rate"
    )


def _features_as_random(run: Run) -> str | None:
    # Where weights were good before, similarities may well stay; and while the rate still rises, it is too early to say.
    rates = run.values("lr", run.window)
    if run.from_released_weights or len(run.records) < 2 * run.config.window_steps or (rates and rates[-1] > rates[0]):
        return None
    watched = (
        ("cls_drift", run.config.min_cls_drift, "similarities between slices' CLS tokens"),
        ("patch_drift", run.config.min_patch_drift, "similarities between a slice's patches"),
    )
    signs = []
    for name, limit, what in watched:
        drift = run.values(f"features/{name}")
        if drift and max(drift) < limit:
            signs.append(f"{what} have changed by {drift[-1]:.2g} since the first probe (limit {limit:g})")
    if not signs:
        return None
    return (
        f"The features do not differ from those of random weights: after step {run.records[-1]['step']} {'; '.join(signs)}. "
        f"{NEW_RUN}; from scratch with backbone.changes.layerscale_init=1, a higher learning rate, and nothing that holds the "
        "backbone (optimizer.layerwise_decay=1, patch_embed_lr_multiplier=1, schedule.freeze_backbone_steps=0)"
    )


def _patches_degraded(run: Run) -> str | None:
    scores = run.values("features/patch_consistency")
    if len(scores) < 2 or max(scores) - scores[-1] <= run.config.max_consistency_loss:
        return None
    best = max(range(len(scores)), key=scores.__getitem__)
    steps = [int(record["step"]) for record in run.records if record.get("features/patch_consistency") is not None]
    return (
        f"Patch features get worse: consistency was {scores[best]:.3f} at step {steps[best]} and is {scores[-1]:.3f} now. "
        "A stage that anchors them to a backbone kept at about that step mends it"
    )


# The most severe first: that is how they are shown.
RULES: tuple[tuple[str, int, Callable[[Run], str | None]], ...] = (
    ("collapsed", logging.WARNING, _collapsed),
    ("diverging", logging.WARNING, _diverging),
    ("drifted", logging.WARNING, _drifted),
    ("heads_uniform", logging.WARNING, _heads_uniform),
    ("features_as_random", logging.WARNING, _features_as_random),
    ("heads_not_learning", logging.INFO, _heads_not_learning),
    ("patches_degraded", logging.INFO, _patches_degraded),
    ("loader_bound", logging.INFO, _loader_bound),
)
