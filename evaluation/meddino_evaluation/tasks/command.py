"""`meddino-eval tasks list | show | fake | prepare`: definitions, tiny fake copies, and published files made readable."""

import argparse
import sys
from pathlib import Path

from meddino.core.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval tasks`."""
    parser.add_argument(
        "action",
        choices=["list", "show", "fake", "prepare"],
        help="list: what is shipped; show: one definition; fake: a tiny copy in the real layout; prepare: published files as a "
        "data set for segment, compare, probe and prompt",
    )
    parser.add_argument("name", nargs="?", help="shipped name or YAML file")
    parser.add_argument("--root", type=Path, help="folder of the published files (prepare)")
    parser.add_argument("--out", type=Path, help="folder to write (fake, prepare)")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval tasks`."""
    from meddino.core.config import to_yaml
    from meddino_evaluation.tasks.definition import load_task, task_names

    if arguments.action == "list":
        for name in task_names():
            task = load_task(name)
            sys.stdout.write(f"{task.name:18} {task.kind:20} {task.title}\n{'':18} {task.licence}; {task.where}\n")
        return
    needed = {"show": ("name",), "fake": ("name", "out"), "prepare": ("name", "root", "out")}[arguments.action]
    missing = [f"--{one}" if one != "name" else "a name" for one in needed if getattr(arguments, one) is None]
    if missing:
        raise ConfigError(f"meddino-eval tasks {arguments.action} needs {', '.join(missing)}")
    if arguments.action == "show":
        sys.stdout.write(to_yaml(load_task(arguments.name)))
    elif arguments.action == "fake":
        from meddino_evaluation.tasks.fake_data import make_fake

        make_fake(arguments.name, arguments.out)
        sys.stdout.write(f"{arguments.out}: a fake copy of {arguments.name}\n")
    else:
        from meddino_evaluation.tasks.prepare import prepare_task

        found = prepare_task(load_task(arguments.name), arguments.root, arguments.out)
        tests = "".join(f" --test {site}={folder}" for site, folder in found.tests.items())
        settings = "".join(f" {one}" for one in found.overrides)
        sys.stdout.write(f"{found.data}: now meddino-eval segment --data {found.data}{tests} ...{settings}\n")
