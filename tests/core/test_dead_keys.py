"""A config key that nothing reads is a bug: every field of every config section is read by code that holds that section."""

import ast
import importlib
from pathlib import Path

import pytest

import meddino
from tests.core.attribute_reads import Source, attributes_read

PACKAGES = ["meddino", "meddino_pretrain", "meddino_data_curation", "meddino_evaluation", "meddino_slurm"]
STRICT = ("meddino.core.config", "StrictConfig")
# Written and compared as a whole, never key by key; and a version, which is right or refused as it is read.
WHOLE = {"TrainingVolumesRecord.sha256", "TrainingVolumesRecord.volumes", "PlannedConfig.licences", "FileRecord.version"}


def files_of(package: str, folder: Path) -> list[tuple[str, Path]]:
    found = []
    for file in sorted(folder.rglob("*.py")):
        parts = [package, *file.relative_to(folder).with_suffix("").parts]
        found.append((".".join(parts).removesuffix(".__init__"), file))
    return found


def sections(source: Source) -> list[tuple[tuple[str, str], list[ast.AnnAssign]]]:
    """Each config section with its fields."""
    return [
        ((module.name, name), [field for field in node.body if isinstance(field, ast.AnnAssign)])
        for module in source.modules.values()
        for name, node in module.names.items()
        if isinstance(node, ast.ClassDef) and (module.name, name) != STRICT and STRICT in source.bases((module.name, name))
    ]


def dead_keys(source: Source) -> list[str]:
    read = attributes_read(source)
    tags = {  # pydantic reads these itself, to choose among sections
        word.value.value
        for module in source.modules.values()
        for word in ast.walk(module.tree)
        if isinstance(word, ast.keyword) and word.arg == "discriminator" and isinstance(word.value, ast.Constant)
    }
    dead = [
        f"{owner[1]}.{field.target.id}"
        for owner, fields in sections(source)
        for field in fields
        if (owner, field.target.id) not in read and field.target.id not in tags
    ]
    return [key for key in dead if key not in WHOLE]


@pytest.fixture(scope="module")
def source() -> Source:
    folders = {package: Path(importlib.import_module(package).__file__).parent for package in PACKAGES}
    return Source(file for package, folder in folders.items() for file in files_of(package, folder))


def test_config__every_key_is_read_by_who_holds_it(source):
    assert len(sections(source)) > 50
    assert dead_keys(source) == []


def test_config__every_key_says_what_it_is(source):
    mute = []
    for owner, fields in sections(source):
        body = source.modules[owner[0]].names[owner[1]].body
        for field in fields:
            after = body[body.index(field) + 1 :][:1]
            documented = after and isinstance(after[0], ast.Expr) and isinstance(after[0].value, ast.Constant)
            if not documented and not _is_section(source, owner, field):
                mute.append(f"{owner[1]}.{field.target.id}")
    assert mute == []


def _is_section(source: Source, owner: tuple[str, str], field: ast.AnnAssign) -> bool:
    types = source.types_of(field.annotation, source.modules[owner[0]])
    return any(what[0] == "object" and STRICT in source.bases(what[1]) for what in types)


PLANTED = """
from meddino.core.config import StrictConfig
from dataclasses import dataclass

class Inner(StrictConfig):
    rate: float
    dead: float

class Outer(StrictConfig):
    inner: Inner
    stages: dict[str, Inner]
    rate: float
    only_checked: int

    @model_validator(mode="after")
    def _check(self) -> "Outer":
        assert self.only_checked
        return self

@dataclass
class Other:
    dead: float

def use(config: Outer, other: Other) -> float:
    {use}
"""


@pytest.mark.parametrize(
    ("use", "dead"),
    [
        ("return other.dead", {"Inner.rate", "Inner.dead", "Outer.inner", "Outer.stages", "Outer.rate", "Outer.only_checked"}),
        ("return config.rate", {"Inner.rate", "Inner.dead", "Outer.inner", "Outer.stages", "Outer.only_checked"}),
        ("return config.inner.rate", {"Inner.dead", "Outer.stages", "Outer.rate", "Outer.only_checked"}),
        (
            "return sum(stage.rate for name, stage in config.stages.items())",
            {"Inner.dead", "Outer.inner", "Outer.rate", "Outer.only_checked"},
        ),
    ],
)
def test_dead_keys__a_key_counts_for_the_section_that_owns_it(use, dead, tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED.format(use=use))
    core = Path(meddino.__file__).parent / "core" / "config.py"
    source = Source([("meddino.core.config", core), *files_of("planted", tmp_path)])
    assert set(dead_keys(source)) == dead


def test_package__is_typed():
    assert (Path(meddino.__file__).parent / "py.typed").is_file()
