"""The Decathlon's layout: dataset.json with "training" pairs, imagesTr/<case>.nii.gz, labelsTr/<case>.nii.gz."""

from pathlib import Path
from typing import Any

from meddino.core.errors import ConfigError, VolumeError
from meddino_evaluation.data.dataset import Case, LabelledDataset
from meddino_evaluation.data.labels import parse_labels


def is_msd(content: dict[str, Any]) -> bool:
    """Tell whether a dataset.json is of the Decathlon: it lists its training pairs."""
    return isinstance(content.get("training"), list)


def read_msd(root: Path, content: dict[str, Any]) -> LabelledDataset:
    """Read a data set in the Decathlon's layout. Its test part has no labels and is not used.

    Raises:
        ConfigError: dataset.json is wrong.
        VolumeError: A file of a pair is missing.
    """
    where = str(root / "dataset.json")
    given = content.get("labels")
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: 'labels' must map values to names")
    try:
        values = {str(name): int(value) for value, name in given.items()}
    except ValueError as error:
        raise ConfigError(f"{where}: 'labels' must map whole numbers to names ({error})") from error
    background = [name for name, value in values.items() if value == 0]
    labels = parse_labels({**{n: v for n, v in values.items() if n not in background}, "background": 0}, None, where)
    channels = content.get("modality", {"0": "CT"})
    if not isinstance(channels, dict) or len(channels) != 1:
        raise ConfigError(
            f"{where}: {len(channels)} modalities in one 4D file; split them into <case>_0000, _0001 (nnU-Net's layout)"
        )
    cases = []
    for pair in content["training"]:
        if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in ("image", "label")):
            raise ConfigError(f"{where}: an entry of 'training' is {pair!r}; expected an object with 'image' and 'label'")
        image, label = (_inside(root, pair[key], where) for key in ("image", "label"))
        name = image.name.removesuffix(".gz").removesuffix(".nii")
        cases.append(Case(name, (image,), label, patient=name))
    if not cases:
        raise ConfigError(f"{where}: 'training' is empty")
    cases.sort(key=lambda case: case.name)
    return LabelledDataset(root.name, root, tuple(cases), labels, tuple(str(name) for name in channels.values()))


def _inside(root: Path, text: str, where: str) -> Path:
    path = root / text
    if not path.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"{where}: '{text}' leads out of the data set's folder")
    if not path.is_file():
        raise VolumeError(f"{where}: {text} is missing")
    return path
