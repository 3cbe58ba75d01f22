"""Configuration: YAML files merged left to right, then `key=value`, then checked as a whole.

A file says only what differs: `extends: NAME` at its top takes everything from another file (of a list, a later one lies
over an earlier one), `like: NAME` in a section takes everything from the section of that name beside it. First the files
are merged, then `like` is followed, so that a change in a section reaches those that are like it; an override comes last
and changes the one key it names.

The only module that knows OmegaConf. What comes out is a frozen pydantic model; nothing else walks into other code.
"""

import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import YAMLError

from meddino.core.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="StrictConfig")
EXTENDS, LIKE = "extends", "like"


def shipped_configs() -> Path:
    """Return the folder of the shipped YAML files: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


class StrictConfig(BaseModel):
    """A config section: frozen, no silent conversions, an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def members(cls) -> "tuple[type[StrictConfig], ...]":
        """Return the sections that a field of this type may hold: itself, unless it stands for several told by a key."""
        return (cls,)


@dataclass(frozen=True)
class MergedValues:
    """What files and overrides say together, not yet checked.

    Attributes:
        values: Nested dicts and lists.
        origins: Dotted key of each value that was given -> the file or override that gave it.
        where: All files and overrides, for messages.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    where: str


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
    merged = merge_config(schema, sources, overrides, kind)
    return check_config(schema, merged.values, merged.where)


def merge_config(
    schema: type[StrictConfig], sources: Sequence[str | Path], overrides: Sequence[str] = (), kind: str | None = None
) -> MergedValues:
    """Read and merge a configuration; see `load_config`, which also checks it.

    Raises:
        ConfigError: A file is missing, no YAML or extends itself; `like` names no section, or leads back to itself; an
            override names a section that is not there.
    """
    where = " + ".join(str(source) for source in [*sources, *overrides]) or "(defaults)"
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, layer in (layer for source in sources for layer in _read_with_bases(source, kind)):
        values = _merged(values, layer)
        origins |= dict.fromkeys(_leaves(layer), name)
    for path, sections in _named_sections(schema, values):
        found = {name: _follow_like(sections, name, path, where, origins) for name in sections}
        sections.update(found)
    for override in overrides:
        layer = _parse_override(override)
        _refuse_new_sections(schema, values, layer, override)
        values = _merged(values, layer)
        origins |= dict.fromkeys(_leaves(layer), override)
    return MergedValues(_interpolated(values, where), origins, where)


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


def _read_with_bases(source: str | Path, kind: str | None, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return a file's name and values after those of the files that it extends, the lowest first."""
    path = find_config(source, kind)
    if path.resolve() in [other.resolve() for other in above]:
        raise ConfigError(f"config {above[0]}: extends goes round: {' -> '.join(other.stem for other in (*above, path))}")
    values = _read(path)
    given = values.pop(EXTENDS, [])
    bases = [given] if isinstance(given, str) else given
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"config {path}: extends is {given!r}; give the name or the path of one config, or a list of them")
    layers: list[tuple[str, dict[str, Any]]] = []
    for base in bases:
        beside = [file for file in (path.parent / base, path.parent / f"{base}.yaml") if file.is_file()]
        try:
            find_config(beside[0] if beside else base, kind)
        except ConfigError as error:
            raise ConfigError(f"config {path}: extends: {error}") from error
        layers += _read_with_bases(beside[0] if beside else base, kind, (*above, path))
    return [*layers, (path.stem, values)]


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"config {path}: expected `key: value` lines at the top, found {type(loaded).__name__}")
    return _plain(loaded)


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, _ = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"'{text}' is no override; write key=value, for example seed=1")
    try:
        return _plain(OmegaConf.from_dotlist([text]))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override '{text}': {' '.join(str(error).split())}") from error


def _plain(loaded: DictConfig) -> dict[str, Any]:
    return typing.cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False))


def _interpolated(values: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        written = json.dumps(values)
    except TypeError as error:  # YAML's !!binary is bytes
        raise ConfigError(f"config {where} holds a value that is no number, text, list or section: {error}") from error
    if "${" not in written:  # OmegaConf takes as long for this as everything else does
        return values
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(values), resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"config {where}: {str(error).splitlines()[0]}") from error


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return one mapping over another: mappings merge, anything else replaces what was there."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _follow_like(
    sections: dict[str, Any], name: str, path: str, where: str, origins: dict[str, str], chain: tuple[str, ...] = ()
) -> Any:
    """Return a section with everything from the one it is like, and note where its values come from."""
    section = sections[name]
    if not isinstance(section, dict) or LIKE not in section:
        return section
    other, chain = section[LIKE], (*chain, name)
    if other in chain:
        raise ConfigError(f"config {where}: {path}: like goes round: {' -> '.join([*chain, other])}")
    if other not in sections:
        others = ", ".join(key for key in sections if key != name)
        raise ConfigError(f"config {where}: '{path}.{name}.like' is {other!r}; beside it there are: {others}")
    taken = _follow_like(sections, other, path, where, origins, chain)
    for key in _leaves(taken):
        given = origins.get(f"{path}.{other}.{key}")
        if given is not None:
            origins.setdefault(f"{path}.{name}.{key}", f"{given.partition(', ')[0]}, like {other}")
    return _merged(taken, {key: value for key, value in section.items() if key != LIKE})


def _refuse_new_sections(schema: type[StrictConfig], values: dict[str, Any], layer: dict[str, Any], override: str) -> None:
    # A misspelt name would begin a section of its own, which then lacks everything.
    there = dict(_named_sections(schema, values))
    for path, sections in _named_sections(schema, layer):
        for name in sections:
            if path in there and name not in there[path]:
                raise ConfigError(f"override '{override}': no '{name}' in {path}; {path}: {', '.join(there[path])}")


def _named_sections(schema: type[BaseModel], values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the dotted key and the content of each mapping from names to sections, such as a recipe's stages."""
    for key, field in schema.model_fields.items():
        value, models = values.get(key), _models_in(field.annotation)
        if not isinstance(value, dict) or not models:
            continue
        if typing.get_origin(field.annotation) is dict:
            yield f"{prefix}{key}", value
        else:
            yield from _named_sections(models[0], value, f"{prefix}{key}.")


def _leaves(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix


def _describe(schema: type[BaseModel], problem: Any) -> str:
    location, models = _walk(schema, problem["loc"])
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = sorted({name for model in models for name in model.model_fields})
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


def _walk(schema: type[BaseModel], location: Sequence[Any]) -> tuple[list[Any], list[type[BaseModel]]]:
    """Return the keys of pydantic's location, in which it also names members of unions, and the sections it ends in."""
    models, keys = [schema], []
    for part in location:
        members = [model for model in models if len(models) > 1 and part in _tags(model)]
        if members:
            models = members
            continue
        keys.append(part)
        inside = [
            model for owner in models if part in owner.model_fields for model in _models_in(owner.model_fields[part].annotation)
        ]
        models = inside or models
    return keys, models


def _tags(model: type[BaseModel]) -> set[Any]:
    return {
        value
        for field in model.model_fields.values()
        if typing.get_origin(field.annotation) is Literal
        for value in typing.get_args(field.annotation)
    }


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return list(annotation.members()) if issubclass(annotation, StrictConfig) else [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
