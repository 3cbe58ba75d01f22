"""A config in full, each value with its unit and source and with the file that gave it; or what two configs differ in."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meddino.core.config import ConfigT, StrictConfig, check_config, differences, merge_config

_PLAIN_TEXT = re.compile(r"[A-Za-z_./][\w./:@+-]*")


def resolve_config(
    schema: type[ConfigT], source: str, overrides: Sequence[str], kind: str
) -> tuple[ConfigT, Mapping[str, str]]:
    """Return a config, and of each value that is no default the file or override that gave it.

    Args:
        schema: The model that says which keys exist.
        source: A YAML file, the name of a shipped config, or a folder with a config.yaml, such as a run's.
        overrides: `key=value` texts.
        kind: Folder of the shipped configs.

    Raises:
        ConfigError: As for `load_config`.
    """
    file = Path(source) / "config.yaml"
    merged = merge_config(schema, [file if file.is_file() else source], overrides, kind)
    return check_config(schema, merged.values, merged.where), merged.origins


def show_config(
    schema: type[StrictConfig], source: str, overrides: Sequence[str], kind: str, against: str | None = None
) -> str:
    """Return a config in full as commented YAML, or one line for each key in which it differs from another.

    Raises:
        ConfigError: As for `load_config`.
    """
    config, origins = resolve_config(schema, source, overrides, kind)
    if against is None:
        return "\n".join(config_lines(config, origins))
    other, _ = resolve_config(schema, against, [], kind)
    return "\n".join(differences(other.model_dump(mode="json"), config.model_dump(mode="json")))


def config_lines(config: StrictConfig, origins: Mapping[str, str], path: str = "", indent: int = 0) -> Iterator[str]:
    """Yield a config as lines of YAML that read back to it, each value with where it was said and what it is.

    Args:
        config: A section, or the whole.
        origins: Dotted key of each value that a file or an override gave -> which.
        path: Dotted key of the section, with a dot behind it.
        indent: Spaces before each line.
    """
    start = " " * indent
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{path}{name}"
        if isinstance(value, StrictConfig):
            yield f"{start}{name}:"
            yield from config_lines(value, origins, f"{key}.", indent + 2)
        elif isinstance(value, dict) and any(isinstance(section, StrictConfig) for section in value.values()):
            yield f"{start}{name}:{_comment(field.description)}"
            for section, content in value.items():
                yield f"{start}  {section}:"
                yield from config_lines(content, origins, f"{key}.{section}.", indent + 4)
        else:
            given = next((origin for place, origin in origins.items() if f"{place}.".startswith(f"{key}.")), None)
            text = f"[{given}] {field.description}" if given else field.description
            plain = config.model_dump(mode="json", include={name})[name]
            if isinstance(plain, list) and any(isinstance(item, dict) for item in plain):
                yield f"{start}{name}:{_comment(text)}"
                yield from (f"{start}  - {_flow(item)}" for item in plain)
            else:
                yield f"{start}{name}: {_flow(plain)}{_comment(text)}"


def _comment(text: str | None) -> str:
    return f"  # {' '.join(text.split())}" if text else ""


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if (
        isinstance(value, str)
        and _PLAIN_TEXT.fullmatch(value)
        and value.lower() not in ("null", "true", "false", "yes", "no", "on", "off", "inf", "nan")
    ):
        return value
    return json.dumps(value)
