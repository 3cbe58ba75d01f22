"""`meddino-eval study compare | freeze | few-shot | lvm-med`: many backbones and data sets or tasks, as a list of jobs."""

import argparse
import sys
from pathlib import Path

from meddino_evaluation.metrics.figures import add_figures_argument

STUDY = "study.yaml"
TABLES = ("results", "results_compact", "comparison", "missing")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval study`."""
    parser.add_argument(
        "kind",
        choices=["compare", "freeze", "few-shot", "lvm-med"],
        help="compare: models x protocols x data; "
        "freeze: model x size x frozen or not; few-shot: curves over training patients; "
        "lvm-med: the tasks of the field whose data lie under --root",
    )
    parser.add_argument("--config", help="YAML file or shipped name of the study (not of lvm-med, whose tasks bring theirs)")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="lvm-med: the models; the first is the reference")
    parser.add_argument("--root", type=Path, help="lvm-med: folder with a folder of data for each task")
    parser.add_argument("--tasks", metavar="TASK,TASK", help="lvm-med: only these (`meddino-eval tasks list`)")
    parser.add_argument("--out", required=True, type=Path, help="folder; the same command again goes on there")
    parser.add_argument("--model", help="what {model} stands for in the study's list of models")
    parser.add_argument("--data-root", type=Path, help="folder that the study's data folders are below")
    parser.add_argument("--part", help="i/n: only every n-th job, for job arrays (a SLURM array's own numbers by default)")
    parser.add_argument("--list", action="store_true", help="print the jobs and which are done, and run nothing")
    add_figures_argument(parser)
    parser.add_argument("--columns", help="of results_compact, separated by commas, e.g. auroc,accuracy,brier")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="e.g. evaluation.split.repeats=5; of lvm-med also for one task or kind: detection:training.epochs=10",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval study`."""
    from meddino.core.config import load_config, to_yaml
    from meddino.core.errors import ConfigError, MedDINOError
    from meddino_evaluation.classification.recognise import open_labelled
    from meddino_evaluation.classification.report import chosen_columns
    from meddino_evaluation.study.classification_jobs import list_jobs, load_results
    from meddino_evaluation.study.config import StudyConfig, table_names
    from meddino_evaluation.study.jobs import list_lines, parse_part, run_jobs
    from meddino_evaluation.study.tables import write_study

    if arguments.kind == "lvm-med":
        _run_tasks(arguments)
        return
    if arguments.config is None:
        raise ConfigError(f"study {arguments.kind} needs --config: a YAML file or a shipped name, e.g. study_demo")
    columns = chosen_columns(arguments.columns)
    config = load_config(StudyConfig, [arguments.config], arguments.overrides, kind="evaluation")
    jobs, root = list_jobs(arguments.kind, config, arguments.out, arguments.model, arguments.data_root), arguments.out / "jobs"
    if arguments.list:
        sys.stdout.write(list_lines(jobs, root))
        return
    _refuse_files_of_others(arguments.out, arguments.kind)
    entry_jobs = len(jobs) // len(config.data)  # the jobs of one data set after those of another
    # A folder that is missing is said before the first job.
    datasets = [open_labelled(job.dataset, job.root).config.name for job in jobs[::entry_jobs]]
    names = table_names(config, datasets)
    part = parse_part(arguments.part)
    _begin(arguments.out, arguments.kind, to_yaml(config), part)
    problems = run_jobs(jobs, root, part)
    found = [
        (job, {**content, "data": {**content["data"], "name": name}})
        for place, name in enumerate(names)
        for job, content in load_results(jobs[place * entry_jobs : (place + 1) * entry_jobs], arguments.out)
    ]
    if part is None or len(found) == len(jobs):
        # In an array every task tries; the one that finds all jobs done writes the tables.
        write_study(arguments.kind, config, found, arguments.out, problems, arguments.figures, columns)
        if found:
            sys.stdout.write((arguments.out / "results_compact.md").read_text(encoding="utf-8"))
        sys.stdout.write(f"report: {arguments.out / 'report.html'}\n")
    else:
        sys.stdout.write(f"{len(found)} of {len(jobs)} jobs are done; tables are written when all are\n")
    if problems:
        raise MedDINOError("not every job could run: " + " | ".join(problems))


def _run_tasks(arguments: argparse.Namespace) -> None:
    """Run what lies under a root of the tasks of the field, say what is missing, and write the tables when all is done."""
    from meddino.core.errors import ConfigError, MedDINOError
    from meddino.core.files import canonical_json
    from meddino_evaluation.study.jobs import list_lines, parse_part, run_jobs
    from meddino_evaluation.study.lvm_med import chosen_tasks, list_task_jobs, load_task_results
    from meddino_evaluation.study.lvm_med_tables import missing_table, write_task_study

    if not arguments.models or arguments.root is None:
        raise ConfigError("study lvm-med needs --models MODEL ... and --root FOLDER (a folder of data for each task)")
    tasks = chosen_tasks(arguments.tasks.split(",") if arguments.tasks else ())
    jobs, missing = list_task_jobs(arguments.models, tasks, arguments.root, arguments.overrides)
    said = f"data of {len(missing)} of {len(tasks)} tasks are missing:\n{missing_table(missing, arguments.root).markdown()}"
    said = said if missing else ""
    folder = arguments.out / "jobs"
    if arguments.list:
        sys.stdout.write(list_lines(jobs, folder) + said)
        return
    if not jobs:
        raise ConfigError(
            f"--root {arguments.root}: no task has its data there; looked for the folders "
            f"{', '.join(task.folder or task.name for task in tasks)}"
        )
    _refuse_files_of_others(arguments.out, arguments.kind)
    part = parse_part(arguments.part)
    settings = {"models": arguments.models, "tasks": [task.name for task in tasks], "overrides": arguments.overrides}
    _begin(arguments.out, arguments.kind, canonical_json(settings) + "\n", part)
    problems = run_jobs(jobs, folder, part)
    found = load_task_results(jobs, arguments.out)
    if part is None or len(found) == len(jobs):
        results = write_task_study(found, missing, problems, arguments.root, arguments.out)
        sys.stdout.write(f"{results.markdown()}{said}report: {arguments.out / 'report.html'}\n")
    else:
        sys.stdout.write(f"{len(found)} of {len(jobs)} jobs are done; tables are written when all are\n")
    if problems:
        raise MedDINOError("not every job could run: " + " | ".join(problems))


def _refuse_files_of_others(out: Path, kind: str) -> None:
    """Refuse a folder that another command, another kind of study or the user has filled.

    A study of a version that did not write down its kind goes on: it has jobs, and they say by protocol or by task of what kind
    they are.
    """
    from meddino_evaluation.data.run_folder import SETTINGS, is_marked, refuse_files_of_others

    jobs, is_old = out / "jobs", False
    if not is_marked(out, STUDY):
        key = '"task"' if kind == "lvm-med" else '"protocol"'
        is_old = any(key in path.read_text(encoding="utf-8") for path in jobs.glob("*/job.json"))
        is_old |= kind != "lvm-med" and (out / STUDY).is_file() and jobs.is_dir()
    files = ["report.html", *(f"{name}.{suffix}" for name in TABLES for suffix in ("csv", "md", "tex")), SETTINGS]
    refuse_files_of_others(out, files, STUDY, f"study {kind}", is_old)


def _begin(out: Path, kind: str, settings: str, part: tuple[int, int] | None) -> None:
    """Write the study's settings; parts, which share the folder, leave those that are there."""
    from meddino_evaluation.data.run_folder import begin, is_begun

    if part is None or not is_begun(out, STUDY, f"study {kind}"):
        begin(out, settings, STUDY, f"study {kind}")
