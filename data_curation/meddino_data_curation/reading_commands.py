"""The commands of `meddino-curate` that only read: explain, and of a corpus verify, show, sample."""

import argparse
from pathlib import Path

from meddino.core.command import write_line
from meddino.core.errors import ConfigError, ShardError
from meddino.data.remote import corpus_location


def add_reading_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `explain`, `verify`, `show` and `sample`."""
    parser = commands.add_parser("explain", help="what a file or folder is taken for, which facts decided, what becomes of it")
    parser.add_argument("inputs", nargs="+", help="a file or folder, and key=value as for build")
    parser.add_argument("--config", action="append", default=[], help="as for build")
    parser.set_defaults(handle=_explain)
    for name, about, handle in (
        ("verify", "recompute every checksum of a corpus", _verify),
        ("show", "print what a corpus holds", _show),
        ("sample", "draw some slices onto a contact sheet", _sample),
    ):
        parser = commands.add_parser(name, help=about)
        parser.add_argument("corpus", type=corpus_location, help="folder written by `meddino-curate build`, or its URL")
        parser.set_defaults(handle=handle)
        if name == "sample":
            parser.add_argument("--out", type=Path, required=True, help="PNG to write")
            parser.add_argument("--count", type=int, default=40, help="slices")
            parser.add_argument("--seed", type=int, default=0, help="which slices")


def _explain(arguments: argparse.Namespace) -> None:
    from meddino.core.logging import OutputConsole
    from meddino_data_curation.arguments import curation_config
    from meddino_data_curation.corpus.explain import explain

    explain(curation_config(arguments.inputs, arguments.config, []), OutputConsole(width=160))


def _verify(arguments: argparse.Namespace) -> None:
    from meddino_data_curation.corpus.verify import verify

    problems = verify(arguments.corpus)
    for problem in problems:
        write_line(problem)
    if problems:
        raise ShardError(f"{arguments.corpus}: {len(problems)} problems")
    write_line("every checksum is right")


def _show(arguments: argparse.Namespace) -> None:
    from meddino.core.logging import OutputConsole
    from meddino_data_curation.corpus.show import show

    show(arguments.corpus, OutputConsole())


def _sample(arguments: argparse.Namespace) -> None:
    from meddino_data_curation.corpus.show import write_contact_sheet

    if arguments.count < 1:
        raise ConfigError(f"--count {arguments.count}: a contact sheet shows at least 1 slice")
    if arguments.seed < 0:
        raise ConfigError(f"--seed {arguments.seed}: must be 0 or more")
    write_contact_sheet(arguments.corpus, arguments.out, arguments.count, arguments.seed)
