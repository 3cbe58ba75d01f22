"""`meddino-eval compare`: encoders x what of them learns on one data set, with tests, in one table."""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from meddino.core.config import load_config
from meddino.core.errors import ConfigError, MedDINOError
from meddino.core.files import canonical_json, sha256_file, write_json, write_text
from meddino.core.html import Section, colour_legend, figure, join, page, picture_row, text
from meddino.core.html_charts import apart, case_plot, in_columns, png
from meddino.core.logging import get_logger
from meddino.data.remote import corpus_location
from meddino_evaluation.data.dataset import with_patients
from meddino_evaluation.data.layouts import open_dataset
from meddino_evaluation.data.run_folder import SETTINGS, refuse_files_of_others
from meddino_evaluation.data.splits import SPLITS_FILE
from meddino_evaluation.metrics.figures import add_figures_argument, forest_figure, save_figures
from meddino_evaluation.metrics.statistics import can_be_significant
from meddino_evaluation.metrics.text_table import Table, number_text
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.experiment import open_experiment
from meddino_evaluation.segmentation.overlay import label_colours
from meddino_evaluation.segmentation.report import chosen_cases, picture_path, shown_in
from meddino_evaluation.segmentation.run import segment
from meddino_evaluation.segmentation.segment_command import (
    CONFIG_HELP,
    add_task_argument,
    add_test_argument,
    data_of,
    default_config,
    named,
)
from meddino_evaluation.study.jobs import DONE, list_lines, parse_part, run_jobs, weights_hash
from meddino_evaluation.study.out_of_distribution import drop_pair_table, drop_table, drops
from meddino_evaluation.study.segmentation_runs import (
    Variant,
    check_comparable,
    compare,
    read_variant,
    shared_cases,
    training_differences,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("frozen", "lora", "bitfit", "partial", "finetune")
TABLES = ("comparison", "comparison_compact", "pairs", "drops", "drop_pairs")
NOTE = (
    "Dice, averaged over the labels of a case, then over cases; mean and standard deviation over seeds, 95 % bootstrap "
    "interval over patients; p values over patients (sign-flip permutations, exact up to 13 patients; Wilcoxon), after Holm "
    "over all pairs; mean rank and share of resamples of the patients in which a model is first. Fewer than six patients "
    "cannot reach p < 0.05, and their resamples are hardly different: intervals, p values and ranks are left out. "
    "† the model has seen test volumes in pretraining; "
    "? nobody looked (give --corpus)."
)

_log = get_logger(__name__)
_NO_TEST = "fewer than six patients, or no difference in any case: no test could tell"
DROP_NOTE = (
    "The drop is the mean in distribution minus the mean there. Other patients are in each set, so its interval resamples "
    "both and its p value is of a two-sample permutation test over patients. Drops of two models are compared on the same "
    "cases: the difference of the two models in each case, in distribution against there. p after Holm over each table."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval compare`."""
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=MODEL", help="a model under a name; several allowed"
    )
    parser.add_argument(
        "--modes", nargs="+", default=["frozen"], type=_mode, choices=MODES, help="each model is run in each of these"
    )
    parser.add_argument("--skip", action="append", default=[], metavar="NAME:MODE", help="leave out a combination")
    parser.add_argument("--results", action="append", default=[], metavar="NAME=FOLDER", help="a finished run to compare with")
    parser.add_argument("--data", type=Path, help="data set; needed with --model")
    parser.add_argument("--corpus", type=corpus_location, help="corpus or URL that models learned from: its volumes are marked")
    add_task_argument(parser)
    add_test_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="folder; the same command again goes on there")
    parser.add_argument("--config", help=CONFIG_HELP)
    parser.add_argument("--part", help="i/n: only every n-th job, for job arrays (a SLURM array's own numbers by default)")
    parser.add_argument("--list", action="store_true", help="print the jobs and which are done, and run nothing")
    add_figures_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to set, for all variants")


def _mode(text: str) -> str:
    if "=" in text:  # argparse gives an option of several values all that follow it
        raise argparse.ArgumentTypeError(f"{text} comes right after the modes and is none; put key=value before --modes")
    return text


@dataclass(frozen=True)
class SegmentationJob:
    """One model with one way of learning on one data set."""

    name: str
    model: str
    mode: str
    data: Path
    config: SegmentConfig
    corpus: str | Path | None
    tests: Mapping[str, Path]
    weights: str | None
    contents: Mapping[str, str]

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.name}, {self.mode}"

    @property
    def folder(self) -> str:
        """Name of its folder: another one whenever anything about the job is different."""
        settings = self.config.model_dump(mode="json", exclude={"device": True, "data": {"cache"}})
        roots = {name: str(root) for name, root in self.tests.items()}
        file = Path(self.config.splits.file or "")
        folds = sha256_file(file) if file.is_file() else None
        what = [self.model, self.weights, str(self.data), roots, dict(self.contents), settings, folds]
        what += [] if self.corpus is None else [str(self.corpus)]  # whose patients the test must not hold
        digest = hashlib.sha256(canonical_json(what).encode()).hexdigest()[:10]
        return f"{self.name}_{self.mode}-{digest}"

    def run(self, folder: Path) -> None:
        """Train and test."""
        segment(self.config, self.model, self.data, folder, self.corpus, self.tests)


def list_jobs(arguments: argparse.Namespace) -> list[SegmentationJob]:
    """Return model x mode.

    Raises:
        ConfigError: A model or a setting cannot be; nothing has run yet.
    """
    if arguments.model and arguments.data is None:
        raise ConfigError("--model needs --data")
    if not arguments.model:
        return []
    data, tests, given = data_of(arguments)
    source, jobs = arguments.config or default_config(), []
    contents = {str(root): contents_hash(root) for root in (data, *tests.values())}
    for name, model in named(arguments.model, "--model"):
        weights = weights_hash(model)
        for mode in arguments.modes:
            if f"{name}:{mode}" in arguments.skip:
                continue
            overrides = [*given, f"encoder.mode={mode}"]
            config = load_config(SegmentConfig, [source], overrides, kind="evaluation")
            # Random weights were never pretrained on anything.
            corpus = None if model.startswith("random:") or model == "none" else arguments.corpus
            jobs.append(SegmentationJob(name, model, mode, data, config, corpus, tests, weights, contents))
    return jobs


def contents_hash(root: Path) -> str:
    """Return a hash of a data set's cases, label maps, labels, patients and folds, and of how long each image is.

    Changed data are other jobs. Images are not read for it: one that is changed and keeps its length is not noticed.
    """
    dataset = with_patients(open_dataset(root), None)
    tests = {case.name for case in dataset.test_cases}
    rows = [
        [
            case.name,
            case.patient,
            case.name in tests,
            [path.stat().st_size for path in case.images if path.is_file()],
            dataset.file_hash(case.label) if case.label else None,
        ]
        for case in dataset.all_cases
    ]
    folds = root / SPLITS_FILE
    what = [repr(dataset.labels), dataset.modality, dataset.channel_names, sha256_file(folds) if folds.is_file() else None]
    return hashlib.sha256(canonical_json([*what, rows]).encode()).hexdigest()


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval compare`."""
    jobs, root = list_jobs(arguments), arguments.out / "runs"
    finished = {name: Path(folder) for name, folder in named(arguments.results, "--results")}
    if not jobs and not finished:
        raise ConfigError("nothing to compare: give --model NAME=MODEL or --results NAME=FOLDER")
    if arguments.list:
        sys.stdout.write(list_lines(jobs, root))
        return
    _refuse_files_of_others(arguments.out)
    variants = [read_variant(name, folder) for name, folder in finished.items()]
    tests = {test: path for job in jobs for test, path in job.tests.items()}
    tests |= {name: Path(path) for name, path in named(arguments.test, "--test")}
    # What is wrong is said before the first job.
    if variants:
        check_comparable(variants)
        check_test_sets(variants, tests)
    for job in {one.model: one for one in jobs}.values():
        open_experiment(job.config, job.model, job.data, job.corpus)
    part = parse_part(arguments.part)
    problems = run_jobs(jobs, root, part)
    done = {job.title: root / job.folder for job in jobs if (root / job.folder / DONE).is_file()}
    if part is not None and len(done) < len(jobs):
        sys.stdout.write(f"{len(done)} of {len(jobs)} jobs are done; tables are written when all are\n")
        return
    if problems:
        raise MedDINOError("not every job could run: " + " | ".join(problems))
    folders = finished | done
    variants += [read_variant(name, folder) for name, folder in done.items()]
    found = compare(variants)
    if finished:  # the jobs of one command differ in nothing but what their names say
        found["notes"] += training_differences(variants)
    elsewhere = {test: [read_variant(name, folder / "external" / test) for name, folder in folders.items()] for test in tests}
    external = {test: compare(runs) for test, runs in elsewhere.items()}
    lost = drops(variants, elsewhere) if elsewhere else None
    for note in _every_note(found, external):
        _log.warning("%s", note)
    write_comparison(found, variants, arguments.out, external, arguments.figures, lost)
    for title, one in (("", found), *((f"\n{test}:\n", part) for test, part in external.items())):
        sys.stdout.write(title + main_table(one).markdown() + "\n" + pair_table(one).markdown() + too_few(one))
    if lost is not None:
        sys.stdout.write(f"\nin and out of distribution:\n{drop_table(lost).markdown()}\n{drop_pair_table(lost).markdown()}")
    sys.stdout.write(f"report: {arguments.out / 'report.html'}\n")


def check_test_sets(finished: Sequence[Variant], tests: Mapping[str, Path]) -> None:
    """Look whether finished runs were tested on the very data sets that are given.

    Raises:
        ConfigError: A data set is not there, or a run was not tested on it under its name.
    """
    for name, root in tests.items():
        if not root.exists():
            raise ConfigError(f"--test {name}={root}: no such folder")
        dataset = open_dataset(root)
        for variant in finished:
            data = read_variant(variant.name, variant.folder / "external" / name).metrics["data"]
            labels = [label for label in dataset.labels.names if label in data.get("labels", dataset.labels.names)]
            seen = replace(dataset, labels=dataset.labels.only(labels))
            if seen.data_hash(seen.all_cases) != data["hash"]:
                raise ConfigError(
                    f"--test {name}={root}: {variant.folder} was tested on other data under the name {name} (the data hash in "
                    f"external/{name}/metrics.json is another)"
                )


def _refuse_files_of_others(out: Path) -> None:
    files = ["report.html", *(f"{name}.{suffix}" for name in TABLES for suffix in ("csv", "md", "tex")), SETTINGS]
    refuse_files_of_others(out, files, "comparison.json", "comparison", _is_comparison(out / "comparison.json"))


def _is_comparison(path: Path) -> bool:
    """Tell whether a file is what `write_comparison` writes first."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"metric", "variants", "pairs"} <= content.keys()


def _every_note(found: dict[str, Any], external: Mapping[str, dict[str, Any]]) -> list[str]:
    return [*found["notes"], *(f"test set {test}: {note}" for test, one in external.items() for note in one["notes"])]


def write_comparison(
    found: dict[str, Any],
    variants: Sequence[Variant],
    out: Path,
    external: Mapping[str, dict[str, Any]],
    figures: str | None = None,
    lost: dict[str, Any] | None = None,
) -> None:
    """Write comparison.json, .csv, .md, .tex and report.html; tables of test sets from elsewhere have the set in their name.

    comparison_compact has what a paper's table shows, the best number in bold; `figures` asks for figures/ in a format; `lost`
    is what `drops` found on test sets from elsewhere. What limits a comparison stands below its tables (.md, .tex).
    """
    write_json(out / "comparison.json", {**found, "external": dict(external), **({} if lost is None else {"drops": lost})})
    notes = found["notes"]
    tables = [("comparison", main_table(found), notes), ("pairs", pair_table(found), notes)]
    for test, one in external.items():
        tables += [(f"comparison-{test}", main_table(one), one["notes"]), (f"pairs-{test}", pair_table(one), one["notes"])]
    if lost is not None:
        every = _every_note(found, external)
        tables += [("drops", drop_table(lost), every), ("drop_pairs", drop_pair_table(lost), every)]
    for name, content, limits in tables:
        _write_table(content, out, name, limits)
        if name.startswith("comparison"):
            compact = content.only(("model", "Dice", "95 % over patients")).best_in_bold((), ("Dice",))
            _write_table(compact, out, name.replace("comparison", "comparison_compact", 1), limits)
    if figures is not None:
        drawn = {"forest": found, **{f"forest-{test}": one for test, one in external.items()}}
        save_figures({name: forest_plot(one) for name, one in drawn.items() if one["pairs"]}, out / "figures", figures)
    write_text(out / "report.html", comparison_html(found, variants, external, lost))


def _write_table(content: Table, out: Path, name: str, notes: Sequence[str]) -> None:
    """Write a table with notes below it, in LaTeX as comments; CSV has no place for them."""
    content.write(out, name)
    for suffix, whole, mark in (("md", content.markdown(), ""), ("tex", content.latex(), "% ")):
        if notes:
            write_text(out / f"{name}.{suffix}", whole + "".join(f"\n{mark}{note}\n" for note in notes))


def main_table(found: dict[str, Any]) -> Table:
    """Return one row a variant."""
    rows = [
        (
            entry["name"] + entry["mark"],
            number_text(entry["mean"])
            + (f" ± {number_text(entry['std_over_seeds'])}" if entry["std_over_seeds"] is not None else ""),
            _interval(entry["interval_95"]),
            number_text(entry["mean_rank"], ".2f"),
            number_text(entry["share_first"], ".0%").replace("%", " %"),
            str(entry["cases"]),
            str(entry["seeds"]),
        )
        for entry in found["variants"]
    ]
    return Table(("model", "Dice", "95 % over patients", "mean rank", "first", "cases", "seeds"), tuple(rows))


def too_few(found: dict[str, Any]) -> str:
    """Return a line that says what is left out of the tables and why; "" where nothing is."""
    patients = found["patients"]
    if can_be_significant(patients):
        return ""
    return (
        f"dashes: {patients} patient{'s' * (patients != 1)}, and from fewer than six no interval, p value, rank over resamples "
        "or Kendall's tau could tell anything\n"
    )


def forest_plot(found: dict[str, Any]) -> "Figure":
    """Draw the difference of every pair with its interval; without one (few patients) the difference alone."""
    rows = []
    for pair in found["pairs"]:
        ends = [math.nan if end is None else end for end in pair["interval_95"]]
        difference = math.nan if pair["difference"] is None else pair["difference"]
        rows.append((f"{pair['first']} - {pair['second']}", difference, ends[0], ends[1]))
    return forest_figure(rows, "difference in Dice, 95 % over patients")


def pair_table(found: dict[str, Any]) -> Table:
    """Return one row a pair."""
    rows = [
        (
            f"{pair['first']} - {pair['second']}",
            number_text(pair["difference"], "+.3f"),
            _interval(pair["interval_95"], "+.3f"),
            number_text(pair["p_wilcoxon"]),
            number_text(pair["p_wilcoxon_holm"]),
            number_text(pair["p_permutation_holm"]),
            number_text(pair["smallest_p"], ".2g"),
        )
        for pair in found["pairs"]
    ]
    return Table(
        ("pair", "difference", "95 %", "Wilcoxon p", "after Holm", "permutation p after Holm", "smallest p"), tuple(rows)
    )


def comparison_html(
    found: dict[str, Any],
    variants: Sequence[Variant],
    external: Mapping[str, dict[str, Any]],
    lost: dict[str, Any] | None = None,
) -> str:
    """Return the report: tables, intervals of differences, every case, and the best, the median and the worst in pictures."""
    tau, few = found["ranking_tau"], too_few(found)
    stable = (
        f"Kendall's tau between this ranking and that of a bootstrap resample of the patients: {number_text(tau)} on average."
    )
    said = [few] if few else [] if tau is None else [stable]
    parts = [main_table(found).html(_NO_TEST), *_limits(found), *map(text, said), text(NOTE, "note")]
    sections = [
        Section("Models", join(*parts)),
        *([Section("Pairs", join(pair_table(found).html(_NO_TEST), _forest(found)))] if found["pairs"] else []),
        *(
            Section(
                f"Test set {test}",
                join(main_table(one).html(_NO_TEST), *_limits(one), pair_table(one).html(_NO_TEST), _forest(one)),
            )
            for test, one in external.items()
        ),
        *([Section("In and out of distribution", _drops(lost))] if lost is not None else []),
        Section("Every case", _every_case(variants)),
        Section("Best, median and worst case", _pictures(variants)),
    ]
    data = variants[0].metrics["data"]["name"]
    return page(f"Comparison on {data}", f"{len(variants)} runs of meddino-eval segment on the same test cases.", sections)


def _limits(found: dict[str, Any]) -> list[Markup]:
    return [text(note, "warning") for note in found["notes"]]


def _drops(lost: dict[str, Any]) -> Markup:
    pairs = [drop_pair_table(lost).html(_NO_TEST)] if lost["pairs"] else []
    return join(drop_table(lost).html(_NO_TEST), *pairs, text(DROP_NOTE, "note"))


def _forest(found: dict[str, Any]) -> Markup:
    if not found["pairs"]:
        return Markup("")
    caption = "Difference of Dice, first minus second, with its 95 % interval over patients; the grey line is no difference"
    return in_columns([figure(forest_plot(found), caption)])


def _every_case(variants: Sequence[Variant]) -> Markup:
    shared = shared_cases(variants, "dice")
    values = {
        variant.name: dict(zip(shared.cases, own.tolist(), strict=True))
        for variant, own in zip(variants, shared.values, strict=True)
    }
    title = "Dice of every case, mean over labels and seeds; a line joins the models"
    return in_columns([figure(case_plot(values, "Dice of every case", "Dice"), title)])


def _pictures(variants: Sequence[Variant]) -> Markup:
    """A row a case: the reference, then what each run predicts."""
    shared = shared_cases(variants, "dice")
    tables = [dict(zip(shared.cases, own.tolist(), strict=True)) for own in shared.values]
    cases = sorted(shared.cases, key=lambda case: sum(one[case] for one in tables))
    folds = [{row["case"]: int(row["fold"]) for row in variant.rows} for variant in variants]
    shown: list[Markup] = []
    for title, case in chosen_cases(cases):
        pictures: list[tuple[bytes, str]] = []
        references: list[bytes] = []
        for variant, own, fold in zip(variants, tables, folds, strict=True):
            path = picture_path(variant.folder, fold[case], case)
            if path.is_file():
                reference, prediction = (png(panel) for panel in apart(path.read_bytes()))
                if reference not in references:  # another slice, where the reference is empty
                    references.append(reference)
                    pictures.append((reference, "reference"))
                pictures.append((prediction, f"{variant.name}, Dice {own[case]:.3f}"))
        if pictures:
            shown.append(picture_row(pictures, f"{title}: {case}"))
    if not shown:
        return text("The runs kept no pictures of these cases.")
    data = variants[0].metrics["data"]
    words, legend = text(shown_in(data.get("modality", "ct"))), colour_legend(label_colours(data.get("labels", [])))
    return join(words, legend, *shown)


def _interval(ends: Sequence[float | None], form: str = ".3f") -> str:
    return "-" if None in ends else "{} to {}".format(*(number_text(end, form) for end in ends))
