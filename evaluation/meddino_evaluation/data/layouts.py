"""A data set from its folder: nnU-Net's raw layout, the Decathlon's, a cases.csv, or images/ and labels/ of equal names.

Images are volumes, or pictures with mask pictures or label maps.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import ConfigError, VolumeError
from meddino.core.logging import get_logger
from meddino.data.intensity import MODALITIES, Modality
from meddino.volumes.dicom.structures import name_key, structure_names
from meddino.volumes.pictures import PICTURE_SUFFIXES, is_picture
from meddino.volumes.read import read_label_map
from meddino_evaluation.data.case import LabelMapCase, a_few
from meddino_evaluation.data.columns import read_known_table
from meddino_evaluation.data.dataset import LabelledDataset, modality_of
from meddino_evaluation.data.inputs import ENDINGS, one_file_a_case, stem
from meddino_evaluation.data.labels import MAX_LABEL, LabelScheme, parse_labels
from meddino_evaluation.data.pictures import COLOURS, is_colour, read_mask_picture

TABLE_FILE, LABELS_FILE = "cases.csv", "labels.json"
PAIRS = (("images", "labels"), ("imagesTr", "labelsTr"), ("images", "masks"), ("image", "label"), ("image", "mask"))
"""Folders whose files pair by name, where nothing else describes the data set."""
_log = get_logger(__name__)


def open_dataset(root: Path) -> LabelledDataset:
    """Read a data set, whichever layout it is in.

    Raises:
        ConfigError: It is in none, what describes it is wrong, or two cases have one name.
        VolumeError: A file is missing.
    """
    dataset = _open(root)
    _check_names(dataset)
    for note in dataset.notes:
        _log.warning("%s: %s", root, note)
    return dataset if dataset.modality != "ct" else replace(dataset, modality=modality_of(dataset.channel_names))


def _check_names(dataset: LabelledDataset) -> None:
    """Refuse cases of one name, of which one would be measured for all, and names that lead elsewhere: they become files'."""
    first: dict[str, LabelMapCase] = {}
    for case in dataset.all_cases:
        other = first.setdefault(case.name, case)
        if other is not case:
            raise ConfigError(
                f"{dataset.root}: two cases are named '{case.name}': {other.images[0]} and {case.images[0]}; give each its name"
            )
        if PurePath(case.name).is_absolute() or ".." in PurePath(case.name).parts:
            raise ConfigError(f"{dataset.root}: case '{case.name}' is no name of a file: it leads out of the folder of results")


def _open(root: Path) -> LabelledDataset:
    if not root.is_dir():
        raise ConfigError(f"no data set at {root}: no such folder")
    if (root / "dataset.json").is_file():
        content = _read_json(root / "dataset.json")
        return _decathlon(root, content) if isinstance(content.get("training"), list) else _nnunet_raw(root, content)
    if (root / TABLE_FILE).is_file():
        return _table(root)
    for images, labels in PAIRS:
        if (root / images).is_dir() and (root / labels).is_dir():
            return _pairs(root, root / images, root / labels)
    raise ConfigError(
        f"{root} is no data set: neither dataset.json (nnU-Net's raw layout, the Decathlon's) nor {TABLE_FILE} (case, image, "
        "label) nor the folders images/ and labels/ are in it"
    )


def _nnunet_raw(root: Path, content: dict[str, Any]) -> LabelledDataset:
    """imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz, and imagesTs/labelsTs if there."""
    where = str(root / "dataset.json")
    labels = parse_labels(content.get("labels"), content.get("regions_class_order"), where)
    channels = content.get("channel_names", {"0": "CT"})
    if not isinstance(channels, dict) or not channels:
        raise ConfigError(f"{where}: 'channel_names' must map channel numbers to names")
    ending = content.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise ConfigError(f"{where}: 'file_ending' is {ending!r}; expected a suffix such as .nii.gz")
    names = tuple(str(name) for name in channels.values())
    notes: list[str] = []
    cases = _nnunet_cases(root, "Tr", ending, len(names), notes)
    if not cases:
        raise ConfigError(f"{root} holds no case: no imagesTr/<case>_0000{ending}")
    notes += _told_number(content, len(cases))
    test = _nnunet_cases(root, "Ts", ending, len(names), notes) if (root / "labelsTs").is_dir() else ()
    both = sorted({case.name for case in cases} & {case.name for case in test})
    if both:
        raise ConfigError(f"{root}: cases {both[:5]} are in imagesTr and in imagesTs")
    return LabelledDataset(root.name, root, cases, labels, names, test, notes=tuple(notes))


def _told_number(content: dict[str, Any], cases: int) -> list[str]:
    """Compare the number of cases with what dataset.json says of it."""
    said = content.get("numTraining", cases)
    return [] if str(said) == str(cases) else [f"dataset.json says numTraining {said}, and there are {cases} cases"]


def _unused(folder: Path, used: Container[Path | None], what: str, ending: str = "") -> list[str]:
    """Say which images or label maps of a folder belong to no case."""
    endings = (*ENDINGS, *([ending] if ending else []))
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    lost = [path.name for path in files if path not in used and path.name.endswith(endings) and not path.name.startswith(".")]
    return [f"{folder.name}: {len(lost)} left out ({what}): {a_few(lost)}"] if lost else []


def _nnunet_cases(root: Path, part: str, ending: str, num_channels: int, notes: list[str]) -> tuple[LabelMapCase, ...]:
    """Find the cases of a part; what is left out is added to the notes."""
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
        label = _there(labels / f"{name}{ending}", f"case {name}: its label map")
        cases.append(LabelMapCase(name, tuple(files[channel] for channel in range(num_channels)), label, patient=name))
    notes += _unused(folder, {path for case in cases for path in case.images}, f"not named <case>_0000{ending}", ending)
    notes += _unused(labels, {case.label for case in cases}, "label maps without an image", ending)
    return tuple(cases)


def _decathlon(root: Path, content: dict[str, Any]) -> LabelledDataset:
    """dataset.json with "training" pairs; the test part has no labels and is not used.

    nnU-Net's first version lists the same pairs, and its image files carry a channel: imagesTr/<case>_0000.nii.gz.
    """
    where, given = str(root / "dataset.json"), content.get("labels")
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: 'labels' must map values to names")
    try:
        values = {str(name): int(value) for value, name in given.items()}
    except ValueError as error:
        raise ConfigError(f"{where}: 'labels' must map whole numbers to names ({error})") from error
    if len(values) < len(given):
        twice = sorted(name for name, times in Counter(map(str, given.values())).items() if times > 1)
        raise ConfigError(f"{where}: 'labels' gives several values the name '{twice[0]}'; each has its own")
    labels = parse_labels({**{name: value for name, value in values.items() if value}, "background": 0}, None, where)
    channels = content.get("modality", {"0": "CT"})
    if not isinstance(channels, dict) or not channels:
        raise ConfigError(f"{where}: 'modality' must map channel numbers to names")
    cases: list[tuple[str, LabelMapCase]] = []
    for pair in content["training"]:
        if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in ("image", "label")):
            raise ConfigError(f"{where}: an entry of 'training' is {pair!r}; expected an object with 'image' and 'label'")
        image, label = (root / _within(pair[key], where) for key in ("image", "label"))
        images = _channels_of(image, len(channels), where)
        cases.append((pair["image"], LabelMapCase(stem(image), images, _there(label, where), patient=stem(image))))
    if not cases:
        raise ConfigError(f"{where}: 'training' is empty")
    notes = _told_number(content, len(cases))
    maps = {case.label for _, case in cases if case.label is not None}
    tests = [one for one in content.get("test", []) if isinstance(one, str)] if isinstance(content.get("test"), list) else []
    used = {*maps, *(path for _, case in cases for path in case.images), *(root / one for one in tests)}
    for folder in sorted({path.parent for path in maps}):
        notes += _unused(folder, used, "label maps that 'training' does not name")
    names = tuple(str(name) for name in channels.values())
    apart = sorted(_named_apart(cases, notes), key=lambda case: case.name)
    return LabelledDataset(root.name, root, tuple(apart), labels, names, notes=tuple(notes))


def _named_apart(cases: Sequence[tuple[str, LabelMapCase]], notes: list[str]) -> list[LabelMapCase]:
    """Name cases whose files have one name in several folders by folder and file: A_p1, B_p1 for A/p1.nii.gz, B/p1.nii.gz.

    Args:
        cases: Each with its image's path below the data set, as dataset.json gives it.
        notes: Are added to.
    """
    times = Counter(case.name for _, case in cases)
    folders = {path: PurePath(path).parent for path, _ in cases}
    common = os.path.commonpath(folders.values())
    found = []
    for path, case in cases:
        name = case.name
        if times[name] > 1:
            name = "_".join((*folders[path].relative_to(common).parts, name))
        found.append(replace(case, name=name, patient=name))
    doubled = sorted(name for name, number in times.items() if number > 1)
    if doubled:
        notes.append(f"{len(doubled)} file names are in several folders ({a_few(doubled)}): cases are named <folder>_<file>")
    return found


def _channels_of(image: Path, channels: int, where: str) -> tuple[Path, ...]:
    """Return the image of a pair, or the files of its channels where nnU-Net's first version named them so."""
    ending = image.name.removeprefix(stem(image))
    numbered = [image.with_name(f"{stem(image)}_{channel:04d}{ending}") for channel in range(channels)]
    if not image.exists() and numbered[0].exists():
        return tuple(_there(path, where) for path in numbered)
    if channels > 1:
        raise ConfigError(
            f"{where}: {channels} modalities in one 4D file; split them into <case>_0000, _0001 (nnU-Net's layout)"
        )
    return (_there(image, where),)


def _table(root: Path) -> LabelledDataset:
    """cases.csv: columns case, image, label, and patient, site, part (train, test; nothing: train) and modality if known.

    Paths are below the folder or absolute.
    """
    path, columns = root / TABLE_FILE, ("case", "image", "label")
    optional = ("patient", "site", "part", "modality")
    rows = read_known_table(path, columns, optional, filled=columns, unique="case").rows
    if not rows:
        raise ConfigError(f"{path} holds no case")
    cases: dict[str, LabelMapCase] = {}
    modalities: dict[str, str] = {}
    for row in rows:
        name, part = row["case"], row["part"]
        if part not in ("", "train", "test"):
            raise ConfigError(f"{path}, line {row.line}: part is '{part}'; expected train, test or nothing")
        images = [_of_table(root, text, path) for text in row["image"].split(";")]
        label = _label_file(_of_table(root, row["label"], path), str(path))
        cases[name] = LabelMapCase(name, tuple(images), label, row["patient"] or name, row["site"], part or None)
        modalities.setdefault(row["modality"], name)
    channels = {len(case.images) for case in cases.values()}
    if len(channels) != 1:
        raise ConfigError(f"{path}: cases have different numbers of images ({sorted(channels)}); separate channels by ';'")
    dataset = _described(root, [cases[name] for name in sorted(cases)], channels.pop(), _one_modality(modalities, path))
    test = tuple(case for case in dataset.cases if case.split == "test")
    return replace(dataset, cases=tuple(case for case in dataset.cases if case.split != "test"), test_cases=test)


def _one_modality(modalities: dict[str, str], path: Path) -> Modality | None:
    """Return the modality of a cases.csv, each with a case that has it; None where the column is missing or empty."""
    if len(modalities) > 1:
        found = ", ".join(f"{modality or 'nothing'} (case {case})" for modality, case in modalities.items())
        raise ConfigError(f"{path}: images of mixed modality: {found}; a data set has one")
    named = next((one for one in MODALITIES if one in modalities), None)
    if named is None and "" not in modalities:
        raise ConfigError(f"{path}: modality is '{next(iter(modalities))}'; expected one of {', '.join(MODALITIES)}")
    return named


def _pairs(root: Path, images: Path, labels: Path) -> LabelledDataset:
    """Images and label maps of the same name; an image may be a folder with one DICOM series, and may end in _0000."""
    numbered = ((re.sub(r"_0000$", "", name), path) for name, path in _entries(images, (*ENDINGS, *PICTURE_SUFFIXES)))
    found = one_file_a_case(str(root), numbered, VolumeError)
    drawn = one_file_a_case(str(root), _entries(labels, (*ENDINGS, ".dcm", *PICTURE_SUFFIXES)), VolumeError)
    maps = {name: _label_file(path, str(root)) for name, path in drawn.items()}
    alone = sorted(maps.keys() - found.keys())
    if alone or not maps:
        raise VolumeError(
            f"{root}: label maps {[maps[name].name for name in alone[:5]]} have no image of that name in {images.name}/"
            if maps
            else f"{root}: {labels.name}/ holds no label map ({', '.join(ENDINGS)}, .png, .dcm: DICOM-SEG or RTSTRUCT)"
        )
    without = sorted(found.keys() - maps.keys())
    notes = [f"{len(without)} images have no label map and are left out: {a_few(without)}"] if without else []
    cases = [LabelMapCase(name, (found[name],), maps[name], patient=name) for name in sorted(maps)]
    return replace(_described(root, cases, 1), notes=tuple(notes))


def _entries(folder: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and (path.is_dir() or path.name.lower().endswith(endings)):
            yield path.name if path.is_dir() else stem(path), path


def _label_file(path: Path, where: str) -> Path:
    """Return a label map's file; of a folder, the only file in it, as archives keep a DICOM-SEG or RTSTRUCT."""
    if not path.is_dir():
        return path
    inside = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    if len(inside) != 1:
        raise VolumeError(f"{where}: {path} holds {len(inside)} files; a case has one label map, DICOM-SEG or RTSTRUCT")
    return inside[0]


def _described(root: Path, cases: Sequence[LabelMapCase], channels: int, modality: Modality | None = None) -> LabelledDataset:
    """Name the labels by labels.json ({"background": 0, "tumour": 1, ...}), else by the structures or values that occur."""
    path = root / LABELS_FILE
    scheme = parse_labels(_read_json(path), None, str(path)) if path.is_file() else _found_labels(root, cases)
    names = tuple(str(number) for number in range(channels))
    dataset = LabelledDataset(root.name, root, tuple(cases), scheme, names, modality=modality or "ct")
    flat = {is_picture(case.images[0].name): case for case in cases}
    if len(flat) > 1:
        picture, volume = (f"case {flat[kind].name}: {flat[kind].images[0].name}" for kind in (True, False))
        raise ConfigError(f"{root} mixes pictures ({picture}) and volumes ({volume}); a data set has one kind")
    if False in flat:
        return dataset
    if channels > 1:
        raise ConfigError(f"{root}: case {flat[True].name} has {channels} pictures; a case is one picture, grey or in colour")
    return replace(dataset, channel_names=_colours(root, cases), modality=modality or "image", flat=True)


def _colours(root: Path, cases: Sequence[LabelMapCase]) -> tuple[str, ...]:
    """Return the channels of pictures: three as soon as one is in colour, and say which others are not."""
    grey = [case.name for case in cases if not is_colour(case.images[0])]
    if 0 < len(grey) < len(cases):
        _log.warning("%s: %d of %d pictures are grey and are read as colour: %s", root, len(grey), len(cases), grey[:5])
    return ("grey",) if len(grey) == len(cases) else COLOURS


def _found_labels(root: Path, cases: Sequence[LabelMapCase]) -> LabelScheme:
    files = [case.label for case in cases if case.label is not None]
    drawn = [structure_names(file) for file in files]
    named = sorted({name_key(name): name for names in reversed(drawn) for name in names or ()}.values(), key=name_key)
    if named and None in drawn:
        raise ConfigError(f"{root} has DICOM structures and label maps; name the labels of both in {LABELS_FILE}")
    if named:
        _log.info("%s: labels are the structures %s; %s or labels.use can choose some", root, named, LABELS_FILE)
        return LabelScheme(tuple(named), tuple((place + 1,) for place in range(len(named))), is_ordered=False)
    found = sorted({int(value) for file in files for value in np.unique(_label_values(file))} - {0})
    if not found or found[0] < 0:
        raise ConfigError(f"the label maps of {root} hold the values {found or [0]}; expected some above 0")
    if found[-1] > MAX_LABEL:
        raise ConfigError(f"the label maps of {root} hold the value {found[-1]}; expected at most {MAX_LABEL}")
    _log.info("%s: labels are named by their values %s; %s can name them", root, found, LABELS_FILE)
    return LabelScheme(tuple(str(value) for value in found), tuple((value,) for value in found))


def _label_values(file: Path) -> NDArray[np.int32]:
    return read_mask_picture(file) if is_picture(file.name) else read_label_map(file)[0]


def _of_table(root: Path, text: str, table: Path) -> Path:
    given = Path(text.strip())
    return _there(given if given.is_absolute() else root / _within(text.strip(), str(table)), str(table))


def _within(text: str, where: str) -> str:
    # Links inside the folder may point anywhere: their owner made them. A path that climbs out was not meant.
    if PurePath(text).is_absolute() or ".." in PurePath(text).parts:
        raise ConfigError(f"{where}: '{text}' leads out of the data set's folder")
    return text


def _there(path: Path, where: str) -> Path:
    if not path.exists():
        raise VolumeError(f"{where} {path} is missing")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected an object, found {type(content).__name__}")
    return content
