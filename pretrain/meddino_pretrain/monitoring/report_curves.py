"""The curves of one stage, as its report shows them."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from meddino.core.html import line_chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TERMS = ("loss", "dino_global", "dino_local", "ibot", "koleo", "gram", "leash")
SCHEDULES = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "ema_momentum": "EMA momentum of the teacher",
    "teacher_temperature": "temperature of the targets",
}
# Title, y axis, and the numbers in it with their names in the legend.
LOOKS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("effective rank on fixed slices (RankMe)", "rank", {"health/cls_rankme": "CLS", "health/patch_rankme": "patches"}),
    (
        "prototypes in use",
        "share",
        {
            "prototypes_used": "targets of a step",
            "health/cls_prototypes_used": "fixed slices, CLS",
            "health/patch_prototypes_used": "fixed slices, patches",
        },
    ),
    ("distance of a CLS token to its nearest", "distance", {"health/nearest_distance": "distance"}),
    (
        "change of similarities since the first look",
        "root mean square",
        {"health/cls_drift": "between slices", "health/patch_drift": "between patches"},
    ),
    ("nearest slices that are those of the first look", "share", {"health/neighbours_kept": "share"}),
    ("patch consistency", "consistency", {"health/patch_consistency": "consistency"}),
)
Records = Sequence[Mapping[str, Any]]


def stage_charts(records: Records, prototypes: int) -> "list[Figure]":
    """Draw what was measured in a stage.

    Args:
        records: One a step, maybe thinned, in order.
        prototypes: Outputs K of the DINO head.
    """
    present = {name for record in records for name in record}
    terms = {name: name for name in TERMS if name in present}
    norms = {name: name.removeprefix("grad_norm/") for name in sorted(present) if name.startswith("grad_norm/")}
    charts = [
        line_chart(_series(records, terms), "loss terms", "step", "loss"),
        line_chart(_series(records, norms), "gradient norm before clipping", "step", "L2 norm", log_y=True),
        line_chart(
            _series(records, {"teacher_entropy": "entropy"}),
            "entropy of the targets; at ln K they say nothing",
            "step",
            "nats",
            levels={f"ln K = {math.log(prototypes):.3f}": math.log(prototypes)},
        ),
    ]
    charts += [line_chart(_series(records, {key: key}), title, "step", key) for key, title in SCHEDULES.items()]
    for title, unit, names in LOOKS:
        series = _series(records, {name: words for name, words in names.items() if name in present})
        if series:
            charts.append(line_chart(series, title, "step", unit))
    return charts


def _series(records: Records, names: Mapping[str, str]) -> dict[str, tuple[list[float], list[float]]]:
    """Return step and value of each number wherever it was measured."""
    series = {}
    for name, words in names.items():
        found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if found:
            series[words] = ([step for step, _ in found], [value for _, value in found])
    return series
