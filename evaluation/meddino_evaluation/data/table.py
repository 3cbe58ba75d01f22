"""Plain folders and cases.csv: columns case, image, label (paths below the folder), and patient and site if known."""

import json
from pathlib import Path

import numpy as np

from meddino.core.errors import ConfigError, VolumeError
from meddino.core.tables import read_table
from meddino.volumes.read import read_label_map
from meddino_evaluation.data.dataset import Case, LabelledDataset
from meddino_evaluation.data.labels import LabelScheme, parse_labels

TABLE_FILE = "cases.csv"
LABELS_FILE = "labels.json"


def read_case_table(root: Path) -> LabelledDataset:
    """Read a data set from its cases.csv.

    Label names come from labels.json ({"background": 0, "tumour": 1, ...}) where it is there; else each value that occurs
    in a label map is a label.

    Raises:
        ConfigError: The table is wrong (see `meddino.core.tables`), a case is named twice, or a path leads out of the folder.
        VolumeError: A file is missing.
    """
    path = root / TABLE_FILE
    columns = ("case", "image", "label")
    rows = read_table(path, columns, filled=columns, unique="case").rows
    if not rows:
        raise ConfigError(f"{path} holds no case")
    cases: dict[str, Case] = {}
    for row in rows:
        images = tuple(_inside(root, text, path) for text in row["image"].split(";"))
        label = _inside(root, row["label"], path)
        cases[row["case"]] = Case(row["case"], images, label, row["patient"] or row["case"], row["site"])
    channels = {len(case.images) for case in cases.values()}
    if len(channels) != 1:
        raise ConfigError(f"{path}: cases have different numbers of images ({sorted(channels)}); separate channels by ';'")
    ordered = tuple(cases[name] for name in sorted(cases))
    return LabelledDataset(
        root.name, root, ordered, _labels(root, ordered), tuple(str(number) for number in range(channels.pop()))
    )


def _labels(root: Path, cases: tuple[Case, ...]) -> LabelScheme:
    path = root / LABELS_FILE
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is no valid JSON: {error}") from error
        return parse_labels(content, None, str(path))
    values: set[int] = set()
    for case in cases:
        if case.label is not None:
            values |= set(np.unique(read_label_map(case.label)[0]).tolist())
    found = sorted(values - {0})
    if not found or found[0] < 0:
        raise ConfigError(f"the label maps of {root} hold the values {sorted(values)}; expected some above 0")
    return LabelScheme(tuple(str(value) for value in found), tuple((value,) for value in found))


def _inside(root: Path, text: str, table: Path) -> Path:
    path = root / text.strip()
    if not path.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"{table}: '{text}' leads out of the data set's folder")
    if not path.is_file():
        raise VolumeError(f"{table}: {text} is missing")
    return path
