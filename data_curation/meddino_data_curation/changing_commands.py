"""The commands of `meddino-curate` for finished corpora: add, erase, why, who-saw."""

import argparse
from pathlib import Path

from meddino.core.command import write_line
from meddino.core.errors import ConfigError


def add_changing_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `add`, `erase`, `why` and `who-saw`."""
    _add_add(commands)
    _add_erase(commands)
    _add_why(commands)
    _add_who_saw(commands)


def _add_add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("add", help="put the volumes of more sources into a finished corpus")
    parser.add_argument("inputs", nargs="*", metavar="SOURCE|key=value", help="folders or files; overrides of config keys")
    parser.add_argument("--to", type=Path, required=True, help="the corpus; it is curated as it was")
    parser.add_argument("--config", action="append", default=[], help="with `sources`; path or shipped name; may be repeated")
    parser.add_argument("--name", action="append", default=[], help="what a SOURCE is called in the corpus, in their order")
    parser.add_argument("--exclude", action="append", default=[], help="more held-out data; counts for old volumes too")
    parser.add_argument("--salt-file", type=Path, help="the corpus's salt; <corpus>.private/salt if not given")
    parser.set_defaults(handle=_add, overrides=[])


def _add(arguments: argparse.Namespace) -> None:
    from meddino_data_curation.arguments import curation_config
    from meddino_data_curation.changes.grow import add

    config = curation_config([*arguments.inputs, *arguments.overrides], arguments.config, arguments.name, arguments.exclude)
    if not config.sources:
        raise ConfigError("no source; name a folder of volumes to add")
    add(arguments.to, config, arguments.salt_file)


def _add_erase(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("erase", help="take patients or volumes out of a finished corpus, for good")
    parser.add_argument("corpus", type=Path, help="folder written by `meddino-curate build`")
    parser.add_argument("--patient", action="append", default=[], metavar="ID", help="all of a patient; may be repeated")
    parser.add_argument("--volume", action="append", default=[], metavar="ID", help="a volume id or file; may be repeated")
    parser.add_argument("--list", type=Path, help="text file with a patient, volume, series, file or folder a line")
    parser.add_argument("--salt-file", type=Path, help="the corpus's salt; <corpus>.private/salt if not given")
    parser.set_defaults(handle=_erase)


def _erase(arguments: argparse.Namespace) -> None:
    from meddino_data_curation.changes.erase import erase
    from meddino_data_curation.held_out.exclusion_lists import read_list

    listed = read_list(arguments.list, "list").lines if arguments.list is not None else ()
    done = erase(arguments.corpus, arguments.patient, [*arguments.volume, *listed], arguments.salt_file)
    for _ in done.before[:1]:
        write_line(f"{len(done.before)} names were erased before")
    write_line(f"erased {done.volumes} volumes, {done.slices} slices")
    if done.volumes:
        write_line("runs and exports that learnt from them: meddino-curate who-saw PATIENT --corpus CORPUS --runs DIR")


def _add_why(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("why", help="what became of a file, a patient or a volume")
    parser.add_argument("name", metavar="FILE|ID", help="file, folder, patient, series or study UID, volume id")
    parser.add_argument("corpus", type=Path, help="folder written by `meddino-curate build`")
    parser.add_argument("--salt-file", type=Path, help="the corpus's salt; <corpus>.private/salt if not given")
    parser.set_defaults(handle=_why)


def _why(arguments: argparse.Namespace) -> None:
    from meddino_data_curation.changes.edition import read_edition
    from meddino_data_curation.changes.lookup import why

    for line in why(read_edition(arguments.corpus, arguments.salt_file), arguments.name):
        write_line(line)


def _add_who_saw(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("who-saw", help="name every corpus, run and export whose data hold a patient")
    parser.add_argument("patients", nargs="+", metavar="PATIENT", help="patient ids, as in `erase`")
    parser.add_argument("--corpus", nargs="+", type=Path, required=True, help="corpora with their private folders")
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="runs, or folders above them")
    parser.add_argument("--models", nargs="+", type=Path, default=[], help="exports, or folders above them")
    parser.add_argument("--salt-file", type=Path, help="the corpora's salt; <corpus>.private/salt if not given")
    parser.set_defaults(handle=_who_saw)


def _who_saw(arguments: argparse.Namespace) -> None:
    from meddino_data_curation.changes.edition import read_edition
    from meddino_data_curation.changes.lookup import who_saw

    editions = [read_edition(path, arguments.salt_file) for path in arguments.corpus]
    for edition in editions:
        edition.need_salt()
    seen = who_saw(editions, arguments.patients, [*arguments.runs, *arguments.models])
    for sighting in seen:
        more = f"; {sighting.note}" if sighting.note else ""
        write_line(f"{sighting.kind} {sighting.path}: {sighting.volumes} volumes{more}")
    if not seen:
        write_line("no corpus, run or export that was looked at holds them")
