"""`meddino-eval compare`: encoders x what of them learns on one data set, with tests, in one table."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from meddino.core.errors import ConfigError
from meddino.core.files import write_json, write_text
from meddino.core.html import Section, figure, join, page, table, text
from meddino.data.remote import corpus_location
from meddino_evaluation.classification.results import Table
from meddino_evaluation.segmentation.comparison import Variant, compare, read_variant
from meddino_evaluation.segmentation.report import picture_path
from meddino_evaluation.segmentation.segment_command import add_test_argument, named

MODES = ("frozen", "lora", "bitfit", "partial", "finetune")
NOTE = (
    "Dice, averaged over the labels of a case, then over cases; mean and standard deviation over seeds, 95 % bootstrap "
    "interval over patients; p values over patients (sign-flip permutations, exact up to 13 patients; Wilcoxon), after Holm "
    "over all pairs. Fewer than six patients cannot reach p < 0.05: intervals and p values are left out. "
    "† the model has seen test volumes in pretraining; "
    "? nobody looked (give --corpus)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval compare`."""
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=MODEL", help="a model under a name; several allowed"
    )
    parser.add_argument("--modes", nargs="+", default=["frozen"], choices=MODES, help="each model is run in each of these")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME:MODE", help="leave out a combination")
    parser.add_argument("--results", action="append", default=[], metavar="NAME=FOLDER", help="a finished run to compare with")
    parser.add_argument("--data", type=Path, help="data set; needed with --model")
    parser.add_argument("--corpus", type=corpus_location, help="corpus or URL that models learned from: its volumes are marked")
    add_test_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="folder; the same command again goes on there")
    parser.add_argument("--config", default="segment", help="YAML file or shipped name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to set, for all variants")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval compare`."""
    jobs = [(name, model, mode) for name, model in named(arguments.model, "--model") for mode in arguments.modes]
    jobs = [job for job in jobs if f"{job[0]}:{job[2]}" not in arguments.skip]
    finished = named(arguments.results, "--results")
    tests = {name: Path(folder) for name, folder in named(arguments.test, "--test")}
    if not jobs and not finished:
        raise ConfigError("nothing to compare: give --model NAME=MODEL or --results NAME=FOLDER")
    if jobs and arguments.data is None:
        raise ConfigError("--model needs --data")
    folders = {name: Path(folder) for name, folder in finished}
    variants = [read_variant(name, folder) for name, folder in folders.items()]
    for name, model, mode in jobs:
        folder = arguments.out / "runs" / f"{name}_{mode}"
        _segment(arguments, model, mode, folder, tests)
        folders[f"{name}, {mode}"] = folder
        variants.append(read_variant(f"{name}, {mode}", folder))
    found = compare(variants)
    external = {
        test: compare([read_variant(name, folder / "external" / test) for name, folder in folders.items()]) for test in tests
    }
    write_comparison(found, variants, arguments.out, external)
    for title, one in (("", found), *((f"\n{test}:\n", part) for test, part in external.items())):
        sys.stdout.write(title + main_table(one).markdown() + "\n" + pair_table(one).markdown())
    sys.stdout.write(f"report: {arguments.out / 'report.html'}\n")


def _segment(arguments: argparse.Namespace, model: str, mode: str, folder: Path, tests: Mapping[str, Path]) -> None:
    from meddino.core.config import load_config
    from meddino_evaluation.segmentation.config import SegmentConfig
    from meddino_evaluation.segmentation.run import segment

    # Random weights were never pretrained on anything.
    corpus = None if model.startswith("random:") or model == "none" else arguments.corpus
    overrides = [*arguments.overrides, f"encoder.mode={mode}"]
    config = load_config(SegmentConfig, [arguments.config], overrides, kind="evaluation")
    segment(config, model, arguments.data, folder, corpus, tests)


def write_comparison(
    found: dict[str, Any], variants: Sequence[Variant], out: Path, external: Mapping[str, dict[str, Any]]
) -> None:
    """Write comparison.json, .csv, .md, .tex and report.html; tables of test sets from elsewhere have the set in their name."""
    write_json(out / "comparison.json", {**found, "external": dict(external)})
    tables = [("comparison", main_table(found)), ("pairs", pair_table(found))]
    for test, one in external.items():
        tables += [(f"comparison-{test}", main_table(one)), (f"pairs-{test}", pair_table(one))]
    for name, content in tables:
        write_text(out / f"{name}.csv", content.csv())
        write_text(out / f"{name}.md", content.markdown())
        write_text(out / f"{name}.tex", content.latex())
    write_text(out / "report.html", comparison_html(found, variants, external))


def main_table(found: dict[str, Any]) -> Table:
    """Return one row a variant."""
    rows = [
        (
            entry["name"] + entry["mark"],
            f"{_text(entry['mean'])} ± {_text(entry['std_over_seeds'])}",
            "{} to {}".format(*(_text(end) for end in entry["interval_95"])),
            f"{entry['mean_rank']:.2f}",
            f"{100 * entry['share_first']:.0f} %",
            str(entry["cases"]),
            str(entry["seeds"]),
        )
        for entry in found["variants"]
    ]
    return Table(("model", "Dice", "95 % over patients", "mean rank", "first", "cases", "seeds"), tuple(rows))


def pair_table(found: dict[str, Any]) -> Table:
    """Return one row a pair."""
    rows = [
        (
            f"{pair['first']} - {pair['second']}",
            _text(pair["difference"], "+.3f"),
            "{} to {}".format(*(_text(end, "+.3f") for end in pair["interval_95"])),
            _text(pair["p_wilcoxon"]),
            _text(pair["p_wilcoxon_holm"]),
            _text(pair["p_permutation_holm"]),
            _text(pair["smallest_p"], ".2g"),
        )
        for pair in found["pairs"]
    ]
    return Table(
        ("pair", "difference", "95 %", "Wilcoxon p", "after Holm", "permutation p after Holm", "smallest p"), tuple(rows)
    )


def comparison_html(found: dict[str, Any], variants: Sequence[Variant], external: Mapping[str, dict[str, Any]]) -> str:
    """Return the report with overlays of the best, the median and the worst case of all variants together."""
    tables = [table(content.header, content.rows) for content in (main_table(found), pair_table(found))]
    tau = found["ranking_tau"]
    stable = text(
        f"Kendall's tau between this ranking and that of a bootstrap resample of the patients: {_text(tau)} on average."
    )
    sections = [
        Section("Models", join(tables[0], stable, text(NOTE, "note"))),
        Section("Pairs", tables[1]),
        *(
            Section(
                f"Test set {test}",
                join(*(table(content.header, content.rows) for content in (main_table(one), pair_table(one)))),
            )
            for test, one in external.items()
        ),
        Section("Best, median and worst case", join(*_pictures(variants))),
    ]
    data = variants[0].metrics["data"]["name"]
    return page(f"Comparison on {data}", f"{len(variants)} runs of meddino-eval segment on the same test cases.", sections)


def _pictures(variants: Sequence[Variant]) -> list[Markup]:
    tables = [variant.by_case("dice") for variant in variants]
    cases = sorted(set.intersection(*(set(one) for one in tables)), key=lambda case: sum(one[case] for one in tables))
    fold = {row["case"]: int(row["fold"]) for row in variants[0].rows}
    shown: list[Markup] = []
    for kind, case in (("best", cases[-1]), ("median", cases[len(cases) // 2]), ("worst", cases[0])):
        for variant, own in zip(variants, tables, strict=True):
            path = picture_path(variant.folder, fold[case], case)
            if path.is_file():
                caption = f"{kind}: {case}, {variant.name}, Dice {own[case]:.3f} (reference left, prediction right)"
                shown.append(figure(path.read_bytes(), caption))
    return shown


def _text(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)
