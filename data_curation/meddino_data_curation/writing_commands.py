"""The commands of `meddino-curate` that make or change something: build, plan, merge, audit, phantom."""

import argparse
from pathlib import Path

from meddino.core.command import write_line
from meddino.core.errors import ConfigError, ShardError
from meddino.core.logging import get_logger

_logger = get_logger(__name__)


def add_writing_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `build`, `plan`, `merge`, `audit` and `phantom`."""
    _add_build(commands)
    _add_plan(commands)
    _add_merge_and_audit(commands)
    _add_phantom(commands)


def _add_build(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("build", help="read volumes, write a corpus; the same command again goes on")
    parser.add_argument("inputs", nargs="*", metavar="SOURCE|key=value", help="folders or files; overrides of config keys")
    parser.add_argument("--out", type=Path, required=True, help="the corpus; <out>.private gets salt and source map")
    parser.add_argument("--config", action="append", default=[], help="path or shipped name; may be repeated")
    parser.add_argument("--name", action="append", default=[], help="what a SOURCE is called in the corpus, in their order")
    parser.add_argument(
        "--exclude", action="append", default=[], help="held-out volumes, a corpus, or a list of ids or paths; how: exclusion.*"
    )
    parser.add_argument("--part", help="i/n: do one share of the volumes, for job arrays; then `merge`")
    parser.set_defaults(handle=_build, overrides=[])  # gets the key=value words that stand behind options


def _build(arguments: argparse.Namespace) -> None:
    from meddino_data_curation.arguments import curation_config
    from meddino_data_curation.corpus.build import Part, build

    config = curation_config([*arguments.inputs, *arguments.overrides], arguments.config, arguments.name, arguments.exclude)
    build(config, arguments.out, Part.parse(arguments.part) if arguments.part else None)


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("plan", help="which public sets lie under a root, what is missing, which licences apply")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="licences.allow=[ID, ...]")
    parser.add_argument("--root", type=Path, required=True, help="folder under which the sets lie")
    parser.add_argument("--at", action="append", default=[], metavar="SET=DIR", help="where a set lies that is named otherwise")
    parser.add_argument("--sets", default="", metavar="A,B", help="only these sets of the registry")
    parser.add_argument(
        "--registry", type=Path, help="lvm_med (its 55 sets), or a folder with one YAML a set; ct3m (17 sets) if not given"
    )
    parser.add_argument("--config", action="append", default=[], help="a config with licences.allow; may be repeated")
    parser.add_argument("--out", type=Path, help="YAML to write, for `build --config`; test data is held out in it")
    parser.add_argument("--with-test-data", action="store_true", help="take the sets' own test data in, as the paper did")
    parser.set_defaults(handle=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from meddino.core.logging import OutputConsole
    from meddino_data_curation.arguments import run_plan

    run_plan(arguments, OutputConsole())


def _add_merge_and_audit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("merge", help="join the parts of a job array, or finished corpora, to one")
    parser.add_argument("parts", nargs="+", type=Path, help="what `build` wrote to; one folder if parts shared it")
    parser.add_argument("--out", type=Path, help="the corpus; the first part if not given")
    parser.set_defaults(handle=_merge)
    parser = commands.add_parser("audit", help="name every overlap of a corpus with data that must stay unseen")
    parser.add_argument("corpus", type=Path, help="folder written by `meddino-curate build`")
    parser.add_argument("--against", nargs="+", type=Path, default=[], help="folders of volumes, or other corpora")
    parser.add_argument("--withdraw", action="append", default=[], metavar="NAME", help="take the record of an audit out")
    parser.add_argument("--name", action="append", default=[], help="what each is called in the record, in their order")
    parser.add_argument("--salt-file", type=Path, help="the corpus's salt; <corpus>.private/salt if not given")
    parser.add_argument("--patient-pattern", default="", help="regex on paths inside the data; its first group is the patient")
    parser.add_argument("--same-ids", action="store_true", help="patient ids mean the same there as in the corpus, even 'P7'")
    parser.add_argument("--allow-unread", action="store_true", help="volumes that cannot be read are counted, no error")
    parser.set_defaults(handle=_audit)


def _merge(arguments: argparse.Namespace) -> None:
    from meddino_data_curation.corpus.merge import merge

    merge(arguments.parts, arguments.out or arguments.parts[0])


def _audit(arguments: argparse.Namespace) -> None:
    from meddino.data.audits import audit_clauses
    from meddino_data_curation.held_out.audit import AuditOptions, audit, withdraw

    if arguments.withdraw:
        withdraw(arguments.corpus, arguments.withdraw)
    elif not arguments.against:
        raise ConfigError("name what to compare with (--against DATA), or which audit to withdraw (--withdraw NAME)")
    if not arguments.against:
        return
    options = AuditOptions(
        arguments.salt_file, arguments.patient_pattern, arguments.same_ids, allow_unread=arguments.allow_unread
    )
    results = audit(arguments.corpus, arguments.against, arguments.name, options)
    for result in results:
        for line in result.lines:
            write_line(f"{result.name}: {line}")
        for clause in audit_clauses(result.entry):
            write_line(f"{result.name}: {clause}")
    if any(result.lines for result in results):
        raise ShardError(f"{arguments.corpus} overlaps with data that must stay unseen; build it again with --exclude")
    problems = [result.problem for result in results if result.problem]
    if problems:
        raise ShardError("; ".join(problems))


def _add_phantom(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("phantom", help="write the embedded cohort of procedural CT patients")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder; gets ct/ and segmentation/")
    parser.add_argument("--patients", type=int, default=16, help="patients in ct/; half as many more in segmentation/")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal bytes")
    parser.set_defaults(handle=_phantom)


def _phantom(arguments: argparse.Namespace) -> None:
    from meddino_data_curation.phantom.cohort import CohortSizes, write_cohort

    write_cohort(arguments.out, CohortSizes.scaled(arguments.patients), arguments.seed)
    _logger.info("wrote the phantom cohort to %s", arguments.out)
