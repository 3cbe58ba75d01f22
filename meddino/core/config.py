"""Configuration: YAML files merged left to right, then `key=value`, then checked as a whole.

The only module that knows OmegaConf. What comes out is a frozen pydantic model; nothing else walks into other code.
"""

import difflib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import YAMLError

from meddino.core.errors import ConfigError
from meddino.core.packaged import shipped_configs

ConfigT = TypeVar("ConfigT", bound="StrictConfig")


class StrictConfig(BaseModel):
    """A config section: frozen, no silent conversions, an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def load_config(
    schema: type[ConfigT], sources: Sequence[str | Path], overrides: Sequence[str] = (), kind: str | None = None
) -> ConfigT:
    """Read, merge and check a configuration.

    Args:
        schema: The model that says which keys exist.
        sources: YAML files, a later one over an earlier one; each a path or the name of a shipped config.
        overrides: `key=value` texts, applied last; dots descend into sections.
        kind: Folder of the shipped configs in which a bare name is looked up ("pretrain", "data_curation", ...).

    Raises:
        ConfigError: A file is missing or no YAML, or values are wrong; then all wrong ones are named at once.
    """
    merged = OmegaConf.create({})
    for source in sources:
        merged = _merged(merged, _read(find_config(source, kind)), str(source))
    for override in overrides:
        merged = _merged(merged, _parse_override(override), override)
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config {_names(sources)}: {str(error).splitlines()[0]}") from error
    return check_config(schema, plain, where=_names([*sources, *overrides]))


def check_config(schema: type[ConfigT], values: Any, where: str) -> ConfigT:
    """Check plain values (from YAML or JSON) against a schema.

    Args:
        schema: The model that says which keys exist.
        values: Nested dicts and lists.
        where: Where the values came from, for the message.

    Raises:
        ConfigError: Names every wrong key with the value found and what is allowed.
    """
    try:
        # Through JSON, in which a list may become a tuple and a text a Path, while "3" still never becomes 3.
        return schema.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [_describe(schema, problem) for problem in error.errors()]
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise ConfigError(f"config {where}: {count}" + "; ".join(problems)) from error


def find_config(source: str | Path, kind: str | None) -> Path:
    """Return the file a config argument means: a path as it is, else a shipped name such as `smoke` or `pretrain/smoke`.

    Raises:
        ConfigError: Neither exists; the message lists the shipped names.
    """
    path = Path(source)
    if path.is_file():
        return path
    root = shipped_configs()
    # "configs/pretrain/smoke.yaml" names the shipped file from any folder, as it does from the project's root.
    relative = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) and len(path.parts) > 1 else path
    folders = [root / kind, root] if kind else [root]
    for folder in folders:
        for candidate in (folder / relative, folder / f"{relative}.yaml"):
            if not path.is_absolute() and candidate.is_file():
                return candidate
    known = sorted(str(file.relative_to(folders[0]).with_suffix("")) for file in folders[0].rglob("*.yaml"))
    raise ConfigError(f"no config file '{source}'; give a path or one of the shipped names: {', '.join(known)}")


def to_yaml(config: BaseModel) -> str:
    """Return a config as YAML that `load_config` reads back to an equal config."""
    return str(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return one line for each key that differs between two plain configs: `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines: list[str] = []
        for key in [*old, *(key for key in new if key not in old)]:
            lines += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}" if prefix else str(key))
        return lines
    return [] if old == new else [f"{prefix}: {old} -> {new}"]


def _names(sources: Sequence[str | Path]) -> str:
    return " + ".join(str(source) for source in sources) or "(defaults)"


def _read(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"config {path}: expected `key: value` lines at the top, found {type(loaded).__name__}")
    return loaded


def _parse_override(text: str) -> DictConfig:
    key, equals, _ = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"'{text}' is no override; write key=value, for example seed=1")
    try:
        return OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override '{text}': {' '.join(str(error).split())}") from error


def _merged(base: DictConfig, top: DictConfig, name: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, top)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config {name}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)  # merging two mappings gives a mapping
    return merged


def _describe(schema: type[BaseModel], problem: Any) -> str:
    location = list(problem["loc"])
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _keys_at(schema, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key '{key}'; {hint}"
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    message = problem["msg"].removeprefix("Value error, ")  # our own validators' words stand for themselves
    if isinstance(problem["input"], dict):
        # A rule between keys: the section it was given would fill a screen.
        return f"{key}: {message}" if key else message
    return f"'{key}' is {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_at(schema: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Return the keys of the section at a location of pydantic's error, which also names union branches."""
    models = [schema]
    for part in location:
        inside = [
            model for owner in models if part in owner.model_fields for model in _models_in(owner.model_fields[part].annotation)
        ]
        models = inside or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
