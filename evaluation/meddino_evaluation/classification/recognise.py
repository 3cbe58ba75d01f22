"""Data sets without a definition: class folders, or a table of images and labels, described by what is found in them."""

import re
from pathlib import Path
from typing import Any

from meddino.core.config import check_config, to_yaml
from meddino.core.errors import ConfigError, VolumeError
from meddino.core.logging import get_logger
from meddino.volumes.pictures import PICTURE_SUFFIXES
from meddino.volumes.read import read_volume
from meddino_evaluation.classification.dataset_config import DatasetConfig
from meddino_evaluation.classification.datasets import LabelledSet, load_dataset_config, open_dataset
from meddino_evaluation.data.columns import read_known_table

_log = get_logger(__name__)
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_IMAGES_AND_LABEL_MAPS = {"images", "labels", "masks", "imagestr", "labelstr", "imagests", "labelsts"}
_AIR_HU = -200
"""Values below it mean Hounsfield units, where a file does not say what it holds."""


def open_labelled(data: str, root: Path | None) -> LabelledSet:
    """Open a data set by what a user wrote: a folder, a table, a shipped name, or a definition's YAML file.

    Args:
        data: A folder of class folders (also below train, val, test) or with one CSV; a CSV with the columns image, label and,
            if known, patient and split; the name of a shipped definition; a YAML file.
        root: Folder of the data; needed for a shipped name only (a YAML file's own folder stands in).

    Raises:
        ConfigError: It is none of these, or the data are not as described.
    """
    path = Path(data)
    if path.is_dir() or path.suffix.lower() in (".csv", ".tsv"):
        config, found = recognise(path)
        return open_dataset(config, found)
    config = load_dataset_config(data)
    if root is None and not path.is_file():
        raise ConfigError(f"--data {data} is a shipped definition: give the folder of the data with --root (from {config.url})")
    return open_dataset(config, root or path.parent)


def recognise(path: Path) -> tuple[DatasetConfig, Path]:
    """Describe a folder or a table, and say in the log as what.

    Returns:
        The definition, and the folder that it is about.

    Raises:
        ConfigError: Neither class folders nor one table with image and label are there.
    """
    if not path.exists():
        raise ConfigError(f"no data at {path}: no such file or folder")
    tables = [path] if path.is_file() else sorted(path.glob("*.csv"))
    if path.is_dir() and len(tables) != 1:
        values, root = _class_folders(path), path
    else:
        values, root = _table(tables[0]), tables[0].parent
    config = check_config(DatasetConfig, {"name": re.sub(r"\W+", "_", path.stem), **values}, str(path))
    _log.info(
        "%s: %s of %s, classes %s%s",
        path,
        f"{config.task} task",
        "CT volumes or slices in Hounsfield units" if config.modality == "ct" else "images by brightness",
        ", ".join(config.classes),
        "; one case is a volume" if config.volume else "",
    )
    return config, root


def write_definition(path: Path, out: Path) -> DatasetConfig:
    """Write the definition of a folder or table as YAML, to be completed by hand.

    Raises:
        ConfigError: The file is there already, or the data are not recognised.
    """
    if out.exists():
        raise ConfigError(f"--out {out} is there already; it may hold what you completed by hand, so name another file")
    config, _ = recognise(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(to_yaml(config), encoding="utf-8")
    return config


def _class_folders(root: Path) -> dict[str, Any]:
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    splits = {path.name: _SPLITS[path.name.lower()] for path in folders if path.name.lower() in _SPLITS}
    inner = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_dir()] if splits else folders
    classes = sorted({path.name for path in inner})
    if len(classes) < 2 or (splits and len(splits) < len(folders)):
        raise ConfigError(
            f"{root} is no classification set: expected a folder a class (also below train, val, test), or one CSV with the "
            f"columns image and label; found the folders {[path.name for path in folders][:8]}"
        )
    if {name.lower() for name in classes} <= _IMAGES_AND_LABEL_MAPS:
        raise ConfigError(f"{root} holds images and label maps, not classes ({', '.join(classes)}): see meddino-eval segment")
    layout: dict[str, Any] = {"kind": "files", "pattern": "*/*", "label_regex": "^([^/]+)/"}
    if splits:
        layout = {"kind": "files", "pattern": "*/*/*", "label_regex": "^[^/]+/([^/]+)/", "split_regex": "^([^/]+)/"}
        layout["split_values"] = splits
    first = next((path for folder in inner for path in sorted(folder.iterdir()) if not path.name.startswith(".")), None)
    if first is None:
        raise ConfigError(f"{root}: the class folders {classes[:8]} are empty")
    return _described(classes, first, layout)


def _table(path: Path) -> dict[str, Any]:
    columns = ("image", "label")
    rows = read_known_table(path, columns, ("patient", "split"), filled=columns).rows
    if not rows:
        raise ConfigError(f"{path} holds no row")
    layout: dict[str, Any] = {"kind": "table", "tables": [path.name], "image": "{image}", "label_columns": ["label"]}
    if any(row["patient"] for row in rows):
        layout["patient_column"] = "patient"
    given = {row["split"] for row in rows} - {""}
    if given:
        strange = sorted(given - _SPLITS.keys())
        if strange:
            raise ConfigError(f"{path}: column split has {strange[:5]}; known: {', '.join(_SPLITS)}")
        layout |= {"split_column": "split", "split_values": {name: _SPLITS[name] for name in sorted(given)}}
    return _described(sorted({row["label"] for row in rows}), path.parent / rows[0]["image"], layout)


def _described(classes: list[str], first: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Return a definition's keys; classes whose names differ in writing alone are one by mistake, and are refused."""
    written: dict[str, str] = {}
    for name in classes:
        other = written.setdefault(_plain(name), name)
        if other != name:
            raise ConfigError(
                f"the labels '{other}' and '{name}' differ in writing alone: write one way of it, or, if they are two classes, "
                "name both in a definition of your own (docs/classification.md)"
            )
    return {
        "task": "binary" if len(classes) == 2 else "multiclass",
        "classes": classes,
        "layout": layout,
        **kind_of_file(first),
    }


def _plain(name: str) -> str:
    """Return a label as it would be compared by a person: 0 is 0.0, and Normal is normal."""
    text = name.strip().casefold()
    try:
        return str(float(text))
    except ValueError:
        return text


def kind_of_file(first: Path) -> dict[str, Any]:
    """Tell from one image what all of them are taken for."""
    if first.name.lower().endswith(PICTURE_SUFFIXES):
        return {"modality": "image", "volume": False}
    try:
        volume = read_volume(first)
    except VolumeError:
        return {"modality": "image", "volume": False}  # an array or the like: reading it says what is wrong
    is_ct = volume.modality == "CT" or (not volume.modality and float(volume.voxels.min()) < _AIR_HU)
    return {"modality": "ct" if is_ct else "image", "volume": len(volume.voxels) > 1}
