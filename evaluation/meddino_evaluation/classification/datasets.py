"""Labelled cases from a data set's definition and the folder it lies in."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from meddino.core.config import load_config
from meddino.core.errors import ConfigError
from meddino.core.tables import Row, read_list, read_table
from meddino.volumes.pictures import read_matlab, split_source
from meddino_evaluation.classification.dataset_config import (
    ArraysLayout,
    DatasetConfig,
    FilesLayout,
    MatlabLayout,
    SegmentationLayout,
    TableLayout,
)
from meddino_evaluation.data.case import ClassCase, ClassLabel, a_few
from meddino_evaluation.metrics.classification import TaskKind

_FEW = 6


@dataclass(frozen=True)
class LabelledSet:
    """A data set that has been found on disk.

    Attributes:
        config: Its definition.
        root: Its folder.
        cases: In the order of their ids.
        has_patients: False where every case (or block of neighbours) counts as a patient of its own.
    """

    config: DatasetConfig
    root: Path
    cases: tuple[ClassCase, ...]
    has_patients: bool

    @property
    def kind(self) -> TaskKind:
        """Kind of task."""
        task = self.config.task
        assert task != "segmentation"  # refused in open_dataset
        return task


def load_dataset_config(name: str | Path) -> DatasetConfig:
    """Read a data set's definition: a YAML file, or the name of a shipped one (e.g. `nih_chestxray14`)."""
    return load_config(DatasetConfig, [name], kind="evaluation/datasets")


def open_dataset(config: DatasetConfig, root: Path) -> LabelledSet:
    """Find the cases of a data set.

    Raises:
        ConfigError: The folder, a table, a column or an image is missing, a label is unknown; names them.
    """
    if not root.is_dir():
        raise ConfigError(f"data set {config.name}: no folder {root}; get the data from {config.url} and name its folder")
    layout = config.layout
    if isinstance(layout, FilesLayout):
        found = list(_from_files(config, layout, root))
    elif isinstance(layout, TableLayout):
        found = list(_from_tables(config, layout, root))
    elif isinstance(layout, ArraysLayout):
        found = list(_from_arrays(config, layout, root))
    elif isinstance(layout, MatlabLayout):
        found = list(_from_matlab(config, layout, root))
    else:
        assert isinstance(layout, SegmentationLayout)
        raise ConfigError(
            f"data set {config.name} is for segmentation: use meddino-eval datasets prepare, then meddino-eval segment"
        )
    if not found:
        raise ConfigError(f"data set {config.name}: nothing found below {root} ({_what(config)})")
    has_patients = all(case.patient for case in found)
    if not has_patients:
        found = [replace(case, patient=case.patient or case.name) for case in found]
    twice = sorted(name for name, times in Counter(case.name for case in found).items() if times > 1)
    if twice:
        raise ConfigError(f"data set {config.name}: case ids occur twice: {a_few(twice, _FEW)}")
    if isinstance(layout, FilesLayout) and not has_patients and layout.neighbours > 1:
        found = _joined_neighbours(found, layout.neighbours)
    return LabelledSet(config, root, tuple(sorted(found, key=lambda case: case.name)), has_patients)


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Order names as people count: image2 before image10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def _what(config: DatasetConfig) -> str:
    layout = config.layout
    if isinstance(layout, TableLayout):
        return f"tables {', '.join(layout.tables)}"
    return f"file {layout.file}" if isinstance(layout, ArraysLayout) else f"pattern {getattr(layout, 'pattern', '')}"


def _class_number(config: DatasetConfig, raw: str, where: str) -> int:
    name = config.labels.get(raw, raw)
    if name not in config.classes:
        raise ConfigError(
            f"data set {config.name}: {where} has the unknown label '{raw}'; "
            f"known: {', '.join(config.labels or config.classes)}"
        )
    return config.classes.index(name)


def _from_files(config: DatasetConfig, layout: FilesLayout, root: Path) -> Iterator[ClassCase]:
    for path in sorted(root.glob(layout.pattern)):
        if path.name.startswith(".") or path.name == "Thumbs.db":
            continue
        relative = path.relative_to(root).as_posix()
        match = re.search(layout.label_regex, relative)
        if match is None:
            raise ConfigError(f"data set {config.name}: no label in the path {relative} (looked for {layout.label_regex})")
        label = _class_number(config, match.group(1), relative)
        found = re.search(layout.split_regex, relative) if layout.split_regex else None
        split = layout.split_values.get(found.group(1)) if found else None
        patient = _matched(layout.patient_regex, relative, config.name)
        yield ClassCase(relative, (path,), label, patient, split=split)


def _matched(regex: str | None, text: str, name: str) -> str:
    if regex is None:
        return ""
    match = re.search(regex, text)
    if match is None:
        raise ConfigError(f"data set {name}: no patient in the path {text} (looked for {regex})")
    return match.group(1)


def _joined_neighbours(cases: list[ClassCase], size: int) -> list[ClassCase]:
    joined = []
    for label in sorted({case.label for case in cases}, key=str):
        ordered = sorted((case for case in cases if case.label == label), key=lambda case: natural_key(case.name))
        joined += [replace(case, patient=f"{label}-{number // size}") for number, case in enumerate(ordered)]
    return joined


def _from_arrays(config: DatasetConfig, layout: ArraysLayout, root: Path) -> Iterator[ClassCase]:
    path = root / layout.file
    if not path.is_file():
        raise ConfigError(f"data set {config.name}: no file {path}")
    with np.load(path, allow_pickle=False) as archive:
        for pair in layout.arrays:
            missing = [name for name in (pair.images, pair.labels) if name not in archive.files]
            if missing:
                raise ConfigError(f"data set {config.name}: {path} has no array {', '.join(missing)}")
            labels = archive[pair.labels]
            labels = labels[:, 0] if labels.ndim == 2 and config.task != "multilabel" else labels
            for number, raw in enumerate(labels):
                label: ClassLabel = (
                    tuple(int(one) for one in raw)
                    if config.task == "multilabel"
                    else _class_number(config, str(int(raw)), f"{pair.labels}[{number}]")
                )
                source = Path(f"{path}#{pair.images}#{number}")
                yield ClassCase(f"{pair.images}-{number:06d}", (source,), label, "", split=pair.split)


def _from_matlab(config: DatasetConfig, layout: MatlabLayout, root: Path) -> Iterator[ClassCase]:
    for path in sorted(root.glob(layout.pattern)):
        raw = str(int(np.asarray(read_matlab(path, layout.label)).reshape(-1)[0]))
        letters = np.asarray(read_matlab(path, layout.patient)).reshape(-1)
        patient = "".join(chr(int(letter)) for letter in letters)
        relative = path.relative_to(root).as_posix()
        yield ClassCase(relative, (Path(f"{path}#{layout.image}"),), _class_number(config, raw, relative), patient)


def _from_tables(config: DatasetConfig, layout: TableLayout, root: Path) -> Iterator[ClassCase]:
    lists = {split: _listed(root / file, config.name) for split, file in layout.split_lists.items()}
    listed = {case: split for split, cases in lists.items() for case in cases}
    seen: set[str] = set()
    for pattern in layout.tables:
        tables = sorted(root.glob(pattern))
        if not tables:
            raise ConfigError(f"data set {config.name}: no table {root / pattern}")
        for table in tables:
            split = layout.table_splits.get(table.relative_to(root).as_posix())
            for case in _rows(config, layout, root, table):
                seen.add(case.name)
                yield replace(case, split=case.split or split or listed.get(case.name))
    strangers = sorted(set(listed) - seen)
    if strangers:
        raise ConfigError(f"data set {config.name}: split lists name ids that no table has: {a_few(strangers, _FEW)}")


def _listed(path: Path, name: str) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"data set {name}: no split list {path}")
    return read_list(path)


def _rows(config: DatasetConfig, layout: TableLayout, root: Path, table: Path) -> Iterator[ClassCase]:
    needed = {*layout.label_columns, *re.findall(r"\{(.+?)\}", layout.image)}
    needed |= {column for column in (layout.id_column, layout.patient_column, layout.split_column) if column}
    filled = [column for column in (layout.patient_column,) if column]
    rows = read_table(table, sorted(needed), filled=filled, header=layout.columns).rows
    absent = []
    for row in rows:
        relative = re.sub(r"\{(.+?)\}", lambda match: row[match.group(1)], layout.image)  # noqa: B023
        source = _find(table.parent, relative)
        name = row[layout.id_column] if layout.id_column else Path(os.path.relpath(table.parent / relative, root)).as_posix()
        if source is None:
            absent.append(name)
            continue
        column = layout.patient_column
        patient = row[column] if column else _matched(layout.patient_regex, relative, config.name)
        raw_split = row[layout.split_column] if layout.split_column else ""
        label = _row_label(config, layout, row, name)
        yield ClassCase(name, (Path(source),), label, patient, split=layout.split_values.get(raw_split))
    if absent:
        raise ConfigError(f"data set {config.name}: table {table} names ids without an image: {a_few(absent, _FEW)}")


def _find(folder: Path, relative: str) -> str | None:
    pattern, hash_sign, key = relative.partition("#")
    if "*" in pattern:
        found = sorted(folder.glob(pattern))
        return str(found[0]) + hash_sign + key if found else None
    source = str(folder / relative)
    return source if split_source(source)[0].exists() else None


def _row_label(config: DatasetConfig, layout: TableLayout, row: Row, name: str) -> ClassLabel:
    if config.task != "multilabel":
        return _class_number(config, row[layout.label_columns[0]], f"case {name}")
    if layout.separator is not None:
        named = [part.strip() for part in row[layout.label_columns[0]].split(layout.separator) if part.strip()]
        chosen = {config.labels.get(part, part) for part in named} - {"none"}
        unknown = sorted(chosen - set(config.classes))
        if unknown:
            raise ConfigError(f"data set {config.name}: case {name} has the unknown label '{unknown[0]}'")
        return tuple(int(one in chosen) for one in config.classes)
    values = []
    for column in layout.label_columns:
        meaning = config.labels.get(row[column], row[column])
        if meaning not in ("0", "1", "unknown"):
            raise ConfigError(f"data set {config.name}: case {name} has the unknown value '{row[column]}' in column {column}")
        values.append(-1 if meaning == "unknown" else int(meaning))
    return tuple(values)
