"""`meddino-pretrain show`: a recipe with everything that its files leave to others, each value with its unit and source."""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meddino.core.command import command_parser, run_command, write_line
from meddino.core.config import StrictConfig, check_config, differences, merge_config
from meddino_pretrain.config import PretrainConfig

_PLAIN_TEXT = re.compile(r"[A-Za-z_./][\w./:@+-]*")


def main(argv: Sequence[str]) -> int:
    """Run `meddino-pretrain show`."""
    parser = command_parser(
        "meddino-pretrain show",
        "Print a recipe in full: every value with its unit and source, and in brackets the file or override that gave it. "
        "What is printed is a recipe itself.",
        "meddino-pretrain show smoke --against cpu_small",
    )
    parser.add_argument("recipe", help="a YAML file, the name of a shipped recipe, or a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key of the recipe")
    parser.add_argument("--against", metavar="OTHER", help="print only the values in which it differs from this recipe or run")
    parser.add_argument("--stages", action="store_true", help="print only the names of its stages, one a line")
    return run_command(parser, argv, _show)


def _show(arguments: argparse.Namespace) -> None:
    config, origins = _load(arguments.recipe, arguments.overrides)
    if arguments.stages:
        lines = iter(config.stages)
    elif arguments.against:
        other, _ = _load(arguments.against, [])
        lines = iter(differences(other.model_dump(mode="json"), config.model_dump(mode="json")))
    else:
        lines = recipe_lines(config, origins)
    write_line("\n".join(lines))


def _load(recipe: str, overrides: Sequence[str]) -> tuple[PretrainConfig, Mapping[str, str]]:
    file = Path(recipe) / "config.yaml"
    merged = merge_config(PretrainConfig, [file if file.is_file() else recipe], overrides, kind="pretrain")
    return check_config(PretrainConfig, merged.values, merged.where), merged.origins


def recipe_lines(config: StrictConfig, origins: Mapping[str, str], path: str = "", indent: int = 0) -> Iterator[str]:
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
            yield from recipe_lines(value, origins, f"{key}.", indent + 2)
        elif isinstance(value, dict) and any(isinstance(section, StrictConfig) for section in value.values()):
            yield f"{start}{name}:{_comment(field.description)}"
            for section, content in value.items():
                yield f"{start}  {section}:"
                yield from recipe_lines(content, origins, f"{key}.{section}.", indent + 4)
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
