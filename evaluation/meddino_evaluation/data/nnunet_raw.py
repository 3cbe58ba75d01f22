"""nnU-Net's raw layout: dataset.json, imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz, and imagesTs/labelsTs if there."""

import json
import re
from pathlib import Path
from typing import Any

from meddino.core.errors import ConfigError, VolumeError
from meddino_evaluation.data.dataset import Case, LabelledDataset
from meddino_evaluation.data.labels import parse_labels


def read_dataset_json(root: Path) -> dict[str, Any]:
    """Read dataset.json.

    Raises:
        ConfigError: The folder or the file is missing, or it is no JSON object.
    """
    path = root / "dataset.json"
    if not root.is_dir():
        raise ConfigError(f"no data set at {root}: no such folder")
    if not path.is_file():
        raise ConfigError(
            f"{root} is no data set in nnU-Net's raw layout: dataset.json is missing (expected beside imagesTr and labelsTr)"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def read_nnunet_raw(root: Path) -> LabelledDataset:
    """Read a data set in nnU-Net's raw layout.

    Raises:
        ConfigError: dataset.json is missing or wrong.
        VolumeError: A case lacks a channel or its label map.
    """
    content = read_dataset_json(root)
    where = str(root / "dataset.json")
    labels = parse_labels(content.get("labels"), content.get("regions_class_order"), where)
    channels = content.get("channel_names", {"0": "CT"})
    if not isinstance(channels, dict) or not channels:
        raise ConfigError(f"{where}: 'channel_names' must map channel numbers to names")
    ending = content.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise ConfigError(f"{where}: 'file_ending' is {ending!r}; expected a suffix such as .nii.gz")
    names = tuple(str(name) for name in channels.values())
    cases = _cases(root, "Tr", ending, len(names))
    if not cases:
        raise ConfigError(f"{root} holds no case: no imagesTr/<case>_0000{ending}")
    test = _cases(root, "Ts", ending, len(names)) if (root / "labelsTs").is_dir() else ()
    both = sorted({case.name for case in cases} & {case.name for case in test})
    if both:
        raise ConfigError(f"{root}: cases {both[:5]} are in imagesTr and in imagesTs")
    return LabelledDataset(root.name, root, cases, labels, names, test)


def _cases(root: Path, part: str, ending: str, num_channels: int) -> tuple[Case, ...]:
    folder, labels = root / f"images{part}", root / f"labels{part}"
    pattern = re.compile(rf"^(?P<case>.+)_(?P<channel>\d{{4}}){re.escape(ending)}$")
    found: dict[str, dict[int, Path]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = pattern.match(path.name)
        if match and not path.name.startswith("."):
            found.setdefault(match["case"], {})[int(match["channel"])] = path
    cases = []
    for name in sorted(found):
        files = found[name]
        if sorted(files) != list(range(num_channels)):
            raise VolumeError(
                f"case {name} in {folder} has the channels {sorted(files)}; dataset.json names {num_channels} "
                f"(0 to {num_channels - 1})"
            )
        label = labels / f"{name}{ending}"
        if not label.is_file():
            raise VolumeError(f"case {name}: its label map {label} is missing")
        cases.append(Case(name, tuple(files[channel] for channel in range(num_channels)), label, patient=name))
    return tuple(cases)
