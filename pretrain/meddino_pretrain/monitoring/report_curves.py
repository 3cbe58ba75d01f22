"""The curves of one stage, as its report shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from meddino.core.html_charts import chart
from meddino_pretrain.methods.config import Chart, Terms

SCHEDULES = (
    Chart("learning rate", "lr", {"lr": "lr"}),
    Chart("weight decay", "weight_decay", {"weight_decay": "weight_decay"}),
)
FEATURES = (
    Chart(
        "effective rank on fixed slices (RankMe)", "rank", {"features/cls_rankme": "CLS", "features/patch_rankme": "patches"}
    ),
    Chart("distance of a CLS token to its nearest", "distance", {"features/nearest_distance": "distance"}),
    Chart(
        "change of similarities since the first probe",
        "root mean square",
        {"features/cls_drift": "between slices", "features/patch_drift": "between patches"},
    ),
    Chart("nearest slices that are those of the first probe", "share", {"features/neighbours_kept": "share"}),
    Chart("patch consistency", "consistency", {"features/patch_consistency": "consistency"}),
    Chart(
        "organs read from patch tokens of labelled patients (chooses nothing)",
        "macro-F1",
        {"labelled/macro_f1": "exported backbone", "labelled/macro_f1_pixels": "pixels alone"},
    ),
)
Records = Sequence[Mapping[str, Any]]


def stage_charts(records: Records, terms: Terms) -> list[Markup]:
    """Draw what was measured in a stage; see `meddino.core.html_charts.chart`.

    Args:
        records: One a step, maybe thinned, in order.
        terms: What the method records.
    """
    present = {name for record in records for name in record}
    losses = {name: name for name in ("loss", *terms.losses) if name in present}
    norms = {name: name.removeprefix("grad_norm/") for name in sorted(present) if name.startswith("grad_norm/")}
    charts = [
        chart(_series(records, losses), "loss terms", "step", "loss"),
        chart(_series(records, norms), "gradient norm before clipping", "step", "L2 norm", log_y=True),
    ]
    charts += [
        chart(_series(records, each.series), each.title, "step", each.unit, levels=each.levels or None)
        for each in (*terms.charts, *SCHEDULES, *FEATURES)
    ]
    return [made for made in charts if made]


def _series(records: Records, names: Mapping[str, str]) -> dict[str, tuple[list[float], list[float]]]:
    """Return step and value of each number wherever it was measured."""
    series = {}
    for name, words in names.items():
        found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if found:
            series[words] = ([step for step, _ in found], [value for _, value in found])
    return series
