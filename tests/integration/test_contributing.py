"""CONTRIBUTING's table "to change X, touch Y": every file and name in it is there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PATH = re.compile(r"[\w/.-]+(?:/|\.(?:py|yaml|md|toml))")
TEXT = "\n".join(path.read_text() for package in ("meddino", "pretrain", "data_curation", "evaluation", "slurm")
                 for path in sorted((PROJECT / package).rglob("*.py")))  # fmt: skip


def rows() -> Iterator[list[str]]:
    table = (PROJECT / "CONTRIBUTING.md").read_text().split("## To change X, touch Y")[1].split("\n## ")[0]
    for line in table.strip().splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def paths(cells: list[str]) -> Iterator[Path]:
    """Yield the files and folders of a row; a bare name lies in the folder that was named last."""
    folder = PROJECT
    for word in re.findall(r"`([^`]+)`", " ".join(cells[1:])):
        if PATH.fullmatch(word):
            found = PROJECT / word if "/" in word else folder / word
            folder = found if word.endswith("/") else found.parent
            yield found


@pytest.mark.parametrize("row", [*rows()], ids=lambda row: row[0])
def test_table__every_path_is_there(row):
    named = list(paths(row))
    assert len(row) == 3 and named
    assert [path for path in named if not path.exists()] == []


@pytest.mark.parametrize("row", [*rows()], ids=lambda row: row[0])
def test_table__every_name_is_there(row):
    words = [word for word in re.findall(r"`([A-Za-z_]\w+)`", " ".join(row[1:])) if not PATH.fullmatch(word)]
    assert [word for word in words if not re.search(rf"\b{word}\b", TEXT)] == []
