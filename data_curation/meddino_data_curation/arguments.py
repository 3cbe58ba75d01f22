"""What the command line says of a curation, turned into a config."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from meddino.core.config import check_config, load_config, to_yaml
from meddino.core.errors import ConfigError
from meddino.core.files import remove_leftovers_of, write_text
from meddino_data_curation.config import CurationConfig, check_distinct
from meddino_data_curation.sources.plan import find_sets, planned_config
from meddino_data_curation.sources.plan_tables import print_plan
from meddino_data_curation.sources.registry import SetEntry, load_registry

DEFAULT_CONFIG = "default"
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


def curation_config(
    inputs: Sequence[str], configs: Sequence[str], names: Sequence[str], exclude: Sequence[str] = ()
) -> CurationConfig:
    """Merge config files, overrides and the sources named on the command line.

    Args:
        inputs: Folders, files and `key=value`, in any order.
        configs: Paths or shipped names; none is the default.
        names: What the sources are called, in their order; the rest become source-1, source-2, ... A folder's own name
            is not used: it may be a patient's.
        exclude: Held-out data, beside what the config names.

    Raises:
        ConfigError: A value is wrong, or there are more names than sources.
    """
    paths = [text for text in inputs if not _OVERRIDE.fullmatch(text) or Path(text).exists()]
    overrides = [text for text in inputs if text not in paths]
    config = load_config(CurationConfig, [DEFAULT_CONFIG, *configs], overrides, kind="data_curation")
    if len(names) > len(paths):
        raise ConfigError(f"{len(names)} --name for {len(paths)} sources; names go to the sources on the command line")
    called = [*names, *(f"source-{number}" for number in range(len(names) + 1, len(paths) + 1))]
    sources = [{"name": name, "path": path} for name, path in zip(called, paths, strict=True)]
    sources += config.model_dump(mode="json")["sources"]
    check_distinct([source["name"] for source in sources], "sources")
    values = config.model_dump(mode="json")
    held_out = [*values["exclude"], *exclude]
    return check_config(CurationConfig, {**values, "sources": sources, "exclude": held_out}, where="sources")


def run_plan(arguments: argparse.Namespace, console: Console) -> None:
    """Do what `meddino-curate plan` was asked for.

    Raises:
        ConfigError: A place, a set or a licence is wrong, or a licence needs a decision and a config was to be written.
    """
    configs = [DEFAULT_CONFIG, *arguments.config]
    allow = load_config(CurationConfig, configs, arguments.overrides, kind="data_curation").licences.allow
    registry = _chosen(load_registry(arguments.registry), [name for name in arguments.sets.split(",") if name])
    found = find_sets(arguments.root, registry, dict(_place(text) for text in arguments.at))
    print_plan(found, allow, console)
    if arguments.out is None:
        return
    planned = planned_config(found, allow, arguments.with_test_data)
    remove_leftovers_of(arguments.out)
    write_text(arguments.out, to_yaml(planned))
    held_out = f"{len(planned.held_out)} sets of test data held out" if planned.held_out else "nothing held out"
    console.print(f"wrote {arguments.out}: {len(planned.sources)} sources, {held_out}", markup=False)
    console.print(f"next: meddino-curate build --config {arguments.out} --out CORPUS", markup=False)


def _chosen(registry: list[SetEntry], names: Sequence[str]) -> list[SetEntry]:
    known = [entry.name for entry in registry]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--sets {unknown[0]}: no such set in the registry; its sets: {', '.join(known)}")
    return [entry for entry in registry if not names or entry.name in names]


def _place(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--at {text}: write SET=DIR, for example btcv=/data/abdomen")
    return name, Path(path)
