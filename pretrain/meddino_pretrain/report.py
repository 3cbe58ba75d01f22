"""run/report.html: how the training went, in pictures."""

from pathlib import Path

from meddino.core.files import write_text
from meddino.core.html import Section, figure, join, line_chart, page, table
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.metrics import read_metrics

TERMS = ("loss", "dino_global", "dino_local", "ibot", "koleo", "gram")


def write_report(run: Path, config: PretrainConfig) -> Path:
    """Write the report of a run from its metrics and return its path."""
    sections = []
    for name in config.stages:
        records = read_metrics(run / name / "metrics.jsonl")
        good = [record for record in records if record["loss"] is not None]
        if not good:
            continue
        steps = [record["step"] for record in good]
        present = [term for term in TERMS if term in good[0]]
        losses = {term: (steps, [record[term] for record in good]) for term in present}
        lr = {"lr": (steps, [record["lr"] for record in good])}
        rows = [(term, good[0][term], good[-1][term]) for term in present]
        body = join(
            table(("term", "first step", "last step"), rows),
            figure(line_chart(losses, f"{name}: loss terms", "step", "loss")),
            figure(line_chart(lr, f"{name}: learning rate", "step", "lr")),
        )
        sections.append(Section(name, body))
    path = run / "report.html"
    write_text(path, page("Pretraining", f"Run {run.name}", sections))
    return path
