"""`meddino-eval study compare | freeze | few-shot`: many backbones and data sets, as a list of jobs."""

import argparse
import sys
from pathlib import Path

from meddino_evaluation.metrics.figures import add_figures_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval study`."""
    parser.add_argument(
        "kind",
        choices=["compare", "freeze", "few-shot"],
        help="compare: models x protocols x data; "
        "freeze: model x size x frozen or not; few-shot: curves over training patients",
    )
    parser.add_argument("--config", required=True, help="YAML file or shipped name of the study")
    parser.add_argument("--out", required=True, type=Path, help="folder; the same command again goes on there")
    parser.add_argument("--model", help="what {model} stands for in the study's list of models")
    parser.add_argument("--data-root", type=Path, help="folder that the study's data folders are below")
    parser.add_argument("--part", help="i/n: only every n-th job, for job arrays (a SLURM array's own numbers by default)")
    parser.add_argument("--list", action="store_true", help="print the jobs and which are done, and run nothing")
    add_figures_argument(parser)
    parser.add_argument("--columns", help="of results_compact, separated by commas, e.g. auroc,accuracy,brier")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. evaluation.split.repeats=5")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval study`."""
    from meddino.core.config import load_config, to_yaml
    from meddino.core.errors import MedDINOError
    from meddino.core.files import write_text
    from meddino_evaluation.classification.recognise import open_labelled
    from meddino_evaluation.classification.report import chosen_columns
    from meddino_evaluation.study.classification_jobs import list_jobs, load_results
    from meddino_evaluation.study.config import StudyConfig
    from meddino_evaluation.study.jobs import list_lines, parse_part, run_jobs
    from meddino_evaluation.study.tables import write_study

    columns = chosen_columns(arguments.columns)
    config = load_config(StudyConfig, [arguments.config], arguments.overrides, kind="evaluation")
    jobs, root = list_jobs(arguments.kind, config, arguments.out, arguments.model, arguments.data_root), arguments.out / "jobs"
    if arguments.list:
        sys.stdout.write(list_lines(jobs, root))
        return
    for name, data_root in dict.fromkeys((job.dataset, job.root) for job in jobs):
        open_labelled(name, data_root)  # a folder that is missing is said before the first job
    part = parse_part(arguments.part)
    if part is None:
        write_text(arguments.out / "study.yaml", to_yaml(config))
    problems = run_jobs(jobs, root, part)
    found = load_results(jobs, arguments.out)
    if part is None or len(found) == len(jobs):
        # In an array every task tries; the one that finds all jobs done writes the tables.
        write_study(arguments.kind, config, found, arguments.out, problems, arguments.figures, columns)
        sys.stdout.write((arguments.out / "results.md").read_text(encoding="utf-8"))
        sys.stdout.write(f"report: {arguments.out / 'report.html'}\n")
    else:
        sys.stdout.write(f"{len(found)} of {len(jobs)} jobs are done; tables are written when all are\n")
    if problems:
        raise MedDINOError("not every job could run: " + " | ".join(problems))
