"""A config key that nothing reads is a bug: every field of every config section is read as an attribute somewhere."""

import ast
import importlib
import pkgutil
from pathlib import Path

import meddino
from meddino.core.config import StrictConfig

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ["meddino", "meddino_pretrain", "meddino_data_curation", "meddino_evaluation", "meddino_slurm"]


def _modules() -> list[str]:
    names = []
    for package in PACKAGES:
        root = importlib.import_module(package)
        names += [module.name for module in pkgutil.walk_packages(root.__path__, f"{package}.")]
    return names


def _sections() -> set[type[StrictConfig]]:
    for name in _modules():
        if name.endswith((".config", "_config", ".intensity")) or "config" in name or "model" in name or "data" in name:
            importlib.import_module(name)
    found, open_ = set(), [StrictConfig]
    while open_:
        children = [child for child in open_.pop().__subclasses__() if child.__module__.split(".")[0] in PACKAGES]
        found.update(children)
        open_ += children
    return found


def _attributes_read() -> set[str]:
    read: set[str] = set()
    for package in PACKAGES:
        folder = Path(importlib.import_module(package).__file__).parent
        for file in folder.rglob("*.py"):
            tree = ast.parse(file.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    return read


def test_config__every_key_is_read():
    read = _attributes_read()
    dead = [
        f"{section.__module__}.{section.__name__}.{name}"
        for section in _sections()
        for name in section.model_fields
        if name not in read
    ]
    assert not dead, dead


def test_config__every_key_says_what_it_is():
    mute = [
        f"{section.__module__}.{section.__name__}.{name}"
        for section in _sections()
        for name, field in section.model_fields.items()
        if not field.description and not _is_section(field.annotation)
    ]
    assert not mute, mute


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, StrictConfig)


def test_package__is_typed():
    assert (Path(meddino.__file__).parent / "py.typed").is_file()
