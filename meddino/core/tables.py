"""Tables and lists that a person wrote: any usual encoding and separator, spaces, BOM; what is odd is named by line and column.

Spreadsheets write UTF-8 with a byte-order mark, UTF-16 or Windows' Latin-1, and separate by comma, semicolon or tab as the
country has it. Reading one of these as another gives two patients for one, or none; so there is one reader for all of them.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meddino.core.errors import ConfigError

SEPARATORS = (",", ";", "\t")
MAX_BYTES = 256 << 20
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
# What no text holds: a picture or an archive given for a table shall not pass as Latin-1, which knows every byte.
_NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f]")


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        line: Its line number in the file, from 1.
        cells: By column name, without spaces around.
    """

    line: int
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        """Return a cell; "" where the table has no such column."""
        return self.cells.get(column, "")


@dataclass(frozen=True)
class Table:
    """A table as it was read.

    Attributes:
        path: The file.
        columns: Names in the header, in order.
        rows: Those that hold anything.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_person_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Return a text file's content without its byte-order mark: UTF-8, UTF-16 (with a mark), else Windows' Latin-1.

    Raises:
        ConfigError: It cannot be read, is larger than `max_bytes`, or no text.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ConfigError(f"{path}: {size} bytes are no table or list; at most {max_bytes} are read")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    text = _decoded(path, content)
    found = _NO_TEXT.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        raise ConfigError(f"{path}, line {line}: holds the character {found.group()!r}; expected UTF-8, UTF-16 or Latin-1 text")
    return text


def read_list(path: Path, max_bytes: int = MAX_BYTES) -> list[str]:
    """Return the lines of a text file that hold anything, without spaces around; see `read_person_text`."""
    return [line for line in (line.strip() for line in read_person_text(path, max_bytes).splitlines()) if line]


def read_table(
    path: Path,
    needed: Sequence[str],
    *,
    filled: Sequence[str] = (),
    unique: str | None = None,
    separators: Sequence[str] = SEPARATORS,
    max_bytes: int = MAX_BYTES,
    header: Sequence[str] = (),
) -> Table:
    """Read a table with a header.

    The separator is the one of comma, semicolon and tab with which the header holds all needed columns; a first line `sep=;`,
    as Excel writes it, is honoured. Cells lose spaces around them; rows without any content are skipped.

    Args:
        path: The file.
        needed: Columns that must be there.
        filled: Columns, if they are there, in which every cell must hold something.
        unique: A column in which no two cells may be equal.
        separators: What may separate cells.
        max_bytes: What is larger is refused.
        header: Names of the columns of a table whose first line is a row already; empty: it has a header.

    Raises:
        ConfigError: It is no text; a column is missing or named twice; a row has more or fewer cells than the header; a quote
            stays open; a cell that must be filled is empty, or one that must be unique is not. With file, line, column, value.
    """
    text = read_person_text(path, max_bytes)
    first_line = 1
    declared = re.match(r"\s*sep=(.)\r?\n", text)
    if declared:
        first_line, separators, text = 2, (declared.group(1),), text[declared.end() :]
    # Lines above the header that hold nothing, spreadsheets leave them.
    while text and not text.partition("\n")[0].strip(" \r;,\t"):
        first_line, text = first_line + 1, text.partition("\n")[2]
    if not text:
        raise ConfigError(f"{path} is empty; it needs a header with {', '.join(needed)}")
    if header:
        first = text.partition("\n")[0]
        separator = max(separators, key=first.count)
        text, first_line = separator.join(header) + "\n" + text, first_line - 1
    else:
        separator = _separator(text, needed, separators)
    lines = _lines(path, text, separator, first_line)
    columns, header_line = tuple(lines[0][1]), lines[0][0]
    missing = [name for name in needed if name not in columns]
    if missing:
        found = ", ".join(columns)
        raise ConfigError(f"{path}, line {header_line}: lacks the column {', '.join(missing)}; found {found}")
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}, line {header_line}: the column {twice[0]} stands there twice")
    rows = tuple(_row(path, columns, line, cells) for line, cells in lines[1:] if any(cells))
    for name in filled:
        empty = next((row for row in rows if name in columns and not row[name]), None)
        if empty:
            raise ConfigError(f"{path}, line {empty.line}, column {name}: is empty")
    if unique is not None:
        _check_unique(path, rows, unique)
    return Table(path, columns, rows)


def first_cell(line: str, separator: str) -> str:
    """Return the first cell of a line of a list, without quotes; the line where its quotes are not closed."""
    try:
        return next(csv.reader([line], delimiter=separator, strict=True), [""])[0].strip()
    except csv.Error:
        return line


def _decoded(path: Path, content: bytes) -> str:
    marked = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), None)
    try:
        return content.decode(marked or "utf-8")
    except UnicodeDecodeError as error:
        if marked:
            raise ConfigError(f"{path}: says that it is {marked} and is not: byte {error.start} is wrong") from error
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _separator(text: str, needed: Sequence[str], separators: Sequence[str]) -> str:
    header = text.partition("\n")[0]
    found = [{cell.strip() for cell in next(csv.reader([header], delimiter=one), [])} for one in separators]
    # All needed columns, else most of them, else the one that occurs most: the message then names what was found.
    scores = [(len(names & set(needed)), header.count(one)) for one, names in zip(separators, found, strict=True)]
    return separators[scores.index(max(scores))]


def _lines(path: Path, text: str, separator: str, first_line: int) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    found, line = [], first_line
    try:
        for cells in reader:
            found.append((line, [cell.strip() for cell in cells]))
            line = first_line + reader.line_num
    except csv.Error as error:
        raise ConfigError(f"{path}, line {line}: {error}; a quote must be closed right before the next separator") from error
    return found


def _row(path: Path, columns: tuple[str, ...], line: int, cells: list[str]) -> Row:
    if len(cells) < len(columns) or any(cells[len(columns) :]):
        raise ConfigError(f"{path}, line {line}: has {len(cells)} cells, the header {len(columns)}; it begins {cells[0]!r}")
    return Row(line, dict(zip(columns, cells[: len(columns)], strict=True)))


def _check_unique(path: Path, rows: Sequence[Row], column: str) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        first = seen.setdefault(row[column], row.line)
        if first != row.line:
            raise ConfigError(f"{path}, line {row.line}, column {column}: '{row[column]}' stands already in line {first}")
