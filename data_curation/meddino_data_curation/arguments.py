"""What the command line says of a curation, turned into a config."""

import re
from collections.abc import Sequence
from pathlib import Path

from meddino.core.config import check_config, load_config
from meddino.core.errors import ConfigError
from meddino_data_curation.config import CurationConfig

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
    twice = {name for name in (source["name"] for source in sources) if [item["name"] for item in sources].count(name) > 1}
    if twice:
        raise ConfigError(f"two sources are called '{min(twice)}'; give each its own name")
    values = config.model_dump(mode="json")
    held_out = [*values["exclude"], *exclude]
    return check_config(CurationConfig, {**values, "sources": sources, "exclude": held_out}, where="sources")
