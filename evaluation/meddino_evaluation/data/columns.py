"""Tables whose columns have names of ours: one that differs from them in its capitals only is refused, never passed over."""

from collections.abc import Sequence
from pathlib import Path

from meddino.core.errors import ConfigError
from meddino.core.tables import Table, read_table


def read_known_table(
    path: Path, needed: Sequence[str], optional: Sequence[str], *, filled: Sequence[str] = (), unique: str | None = None
) -> Table:
    """Read a table that may have some more columns of known names.

    Args:
        path: The file.
        needed: Columns that must be there.
        optional: Columns that are read where they are there.
        filled: See `read_table`.
        unique: See `read_table`.

    Raises:
        ConfigError: See `read_table`; or an optional column has other capitals, so that it would not be read.
    """
    table = read_table(path, needed, filled=filled, unique=unique)
    refuse_other_capitals(table, optional)
    return table


def refuse_other_capitals(table: Table, optional: Sequence[str]) -> None:
    """Refuse a table in which `Patient` stands for `patient`: the column would not be read, and nothing would say so.

    Raises:
        ConfigError: Names the column and how it is written.
    """
    for name in optional:
        strange = [column for column in table.columns if column.lower() == name.lower()]
        if strange and name not in table.columns:
            raise ConfigError(f"{table.path}: the column '{strange[0]}' would not be read; write it '{name}'")
