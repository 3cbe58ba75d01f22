"""Readers of boxes. The files are strangers': sizes are checked first, no entity is expanded, no path leaves its folder."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import ConfigError
from meddino.core.tables import read_list, read_person_text
from meddino.volumes.pictures import split_source
from meddino_evaluation.data.case import ClassCase, a_few
from meddino_evaluation.data.columns import read_known_table
from meddino_evaluation.detection.layouts import BoxLayout, BoxTableLayout, CocoLayout, KvasirLayout, VocLayout

MAX_JSON_BYTES = 1 << 30
MAX_XML_BYTES = 4 << 20


@dataclass(frozen=True)
class BoxCase:
    """One image and its boxes.

    Attributes:
        name: Unique in its data set.
        source: As `classification.images.read_slices` takes it, or `volume#slice`.
        boxes: float64 [n, 4], pixels of the stored image: left, top, right, lower edge; a box of one pixel is 1 wide.
        names: Class of each box.
        patient: "" where nobody knows.
        split: The part that the publishers put it in, if any.
        size_px: Height and width where the file says them.
        where: File and place of each box, for messages.
    """

    name: str
    source: str
    boxes: NDArray[np.float64]
    names: tuple[str, ...]
    patient: str = ""
    split: str | None = None
    size_px: tuple[int, int] | None = None
    where: tuple[str, ...] = ()

    def with_classes(self, classes: Sequence[str]) -> ClassCase:
        """Return what splits are drawn from: which classes occur in the image."""
        return ClassCase(
            self.name, (Path(self.source),), tuple(int(one in self.names) for one in classes), self.patient, split=self.split
        )


@dataclass
class _Growing:
    """An image whose boxes are being collected."""

    source: str
    patient: str = ""
    split: str | None = None
    size_px: tuple[int, int] | None = None
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)

    def add(self, box: Sequence[float], name: str, where: str) -> None:
        self.boxes.append(tuple(box))
        self.names.append(name)
        self.where.append(where)

    def case(self, name: str) -> BoxCase:
        boxes = np.array(self.boxes, dtype=np.float64).reshape(-1, 4)
        return BoxCase(name, self.source, boxes, tuple(self.names), self.patient, self.split, self.size_px, tuple(self.where))


def read_boxes(layout: BoxLayout, root: Path) -> tuple[list[BoxCase], tuple[str, ...] | None]:
    """Read all boxes of a data set.

    Returns:
        The images in the order of their names, and the classes that the files declare (None: they declare none).

    Raises:
        ConfigError: A file is missing or damaged, an id repeats, a box is no box; with file, place and value.
    """
    declared: tuple[str, ...] | None = None
    if isinstance(layout, CocoLayout):
        found, declared = _read_coco_files(layout, root)
    elif isinstance(layout, VocLayout):
        found = list(_read_voc(layout, root))
    elif isinstance(layout, BoxTableLayout):
        found = _read_tables(layout, root)
    else:
        found = _read_kvasir(layout, root)
    if not found:
        raise ConfigError(f"{root}: no image is named by {_what(layout)}")
    twice = [name for name, times in Counter(case.name for case in found).items() if times > 1]
    if twice:
        raise ConfigError(f"{root}: images are named twice: {a_few(sorted(twice))}")
    missing = [case.name for case in found if not split_source(case.source)[0].exists()]
    if missing:
        raise ConfigError(f"{root}: {len(missing)} images are named and not there: {a_few(missing)}")
    _check_shapes(found)
    return sorted(found, key=lambda case: case.name), declared


def _what(layout: BoxLayout) -> str:
    if isinstance(layout, CocoLayout | BoxTableLayout):
        return ", ".join(layout.files if isinstance(layout, CocoLayout) else layout.tables)
    return layout.annotations if isinstance(layout, VocLayout) else layout.file


def _check_shapes(cases: Iterable[BoxCase]) -> None:
    """Refuse boxes without width or height, and corners that are no numbers."""
    wrong = []
    for case in cases:
        x1, y1, x2, y2 = case.boxes.T
        bad = ~np.isfinite(case.boxes).all(1) | ~(x2 > x1) | ~(y2 > y1)
        wrong += [f"{case.where[place]}: {_text(case.boxes[place])}" for place in np.flatnonzero(bad)]
    if wrong:
        raise ConfigError(f"{len(wrong)} boxes have no width or no height (left, top, right, lower edge): {a_few(wrong)}")


def _text(box: NDArray[np.float64]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def _inside(folder: Path, name: str, where: str) -> Path:
    """Return a file below a folder; a name from a stranger's file may not lead out of it."""
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ConfigError(f"{where}: '{name[:80]}' is no path below {folder}")
    return path


def _read_json(path: Path) -> Any:
    text = read_person_text(path, MAX_JSON_BYTES)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error


def _read_coco_files(layout: CocoLayout, root: Path) -> tuple[list[BoxCase], tuple[str, ...]]:
    found: list[BoxCase] = []
    declared: dict[str, None] = {}
    for file, split in layout.files.items():
        cases, classes = read_coco(_inside(root, file, "layout.files"), root / layout.images)
        found += [replace(case, split=split) for case in cases]
        declared |= dict.fromkeys(classes)
    return found, tuple(declared)


def read_coco(path: Path, images: Path) -> tuple[list[BoxCase], tuple[str, ...]]:
    """Read one COCO file.

    Args:
        path: The JSON. Images may have a key `patient` or `patient_id`.
        images: Folder that file_name is below.

    Returns:
        Its images, and its categories' names in the order of their ids.

    Raises:
        ConfigError: An id repeats, is unknown or missing; a box is no list of four numbers; a region is a crowd.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no COCO file: expected an object with images, annotations and categories")
    categories = {number: str(one.get("name", "")) for number, one in _by_id(content, "categories", path).items()}
    twice = [name for name, times in Counter(categories.values()).items() if times > 1]
    if twice:
        raise ConfigError(f"{path}: category names repeat: {a_few(twice)}")
    growing: dict[Any, _Growing] = {}
    names: dict[Any, str] = {}
    for number, one in _by_id(content, "images", path).items():
        names[number] = str(one.get("file_name", ""))
        patient = str(one.get("patient", one.get("patient_id", "")))
        source = str(_inside(images, names[number], f"{path}, image {number}, file_name"))
        growing[number] = _Growing(source, patient)
        height, width = one.get("height"), one.get("width")
        if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
            growing[number].size_px = (height, width)
    for number, one in _by_id(content, "annotations", path).items():
        where, box = f"{path}, annotation {number}", one.get("bbox")
        for key, known_ids in (("image_id", growing), ("category_id", categories)):
            if one.get(key) not in known_ids:
                raise ConfigError(f"{where}: {key} {one.get(key)} is not in the file")
        if one.get("iscrowd"):
            raise ConfigError(
                f"{where} is a crowd (iscrowd): a region of many objects cannot be measured by its box; remove it"
            )
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            raise ConfigError(f"{where}: bbox is {box}; expected [x, y, width, height] in pixels")
        x, y, width, height = map(float, box)
        growing[one["image_id"]].add((x, y, x + width, y + height), categories[one["category_id"]], where)
    classes = tuple(categories[number] for number in sorted(categories, key=lambda one: (str(type(one)), one)))
    return [one.case(names[number]) for number, one in growing.items()], classes


def _by_id(content: Mapping[str, Any], key: str, path: Path) -> dict[Any, dict[str, Any]]:
    rows = content.get(key)
    if not isinstance(rows, list) or not all(isinstance(one, dict) for one in rows):
        raise ConfigError(f"{path}: '{key}' is no list of objects; a COCO file has images, annotations and categories")
    ids = [one.get("id") for one in rows]
    strange = [one for one in ids if not isinstance(one, int | str)]
    if strange:
        raise ConfigError(f"{path}: {key} have ids that are no number or text, such as {strange[0]}")
    twice = [str(one) for one, times in Counter(ids).items() if times > 1]
    if twice:
        raise ConfigError(f"{path}: {key} repeat the ids {a_few(twice)}; every id stands for one")
    return dict(zip(ids, rows, strict=True))


def _read_voc(layout: VocLayout, root: Path) -> Iterator[BoxCase]:
    files = sorted((root / layout.annotations).glob("*.xml"))
    lists = {split: read_list(root / file) for file, split in layout.lists.items()}
    listed = {name.split()[0]: split for split, names in lists.items() for name in names}
    strangers = sorted(set(listed) - {file.stem for file in files})
    if strangers:
        raise ConfigError(f"{root}: the lists {', '.join(layout.lists)} name images without annotations: {a_few(strangers)}")
    for file in files:
        yield replace(read_voc(file, root / layout.images), split=listed.get(file.stem))


def read_voc(path: Path, images: Path) -> BoxCase:
    """Read one VOC file; its corners are pixels counted from 1, both inside the box.

    Raises:
        ConfigError: It is no such XML, declares a document type (entities could grow without end), or a box is incomplete.
    """
    text = read_person_text(path, MAX_XML_BYTES)
    if re.search(r"<!(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise ConfigError(f"{path} declares a document type, which annotations have no need of: it is not read")
    try:
        tree = ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
    except ElementTree.ParseError as error:
        raise ConfigError(f"{path} is no XML: {error}") from error
    filename = (tree.findtext("filename") or "").strip()
    image = _Growing(str(_inside(images, filename, f"{path}, filename")))
    sides = [(tree.findtext(f"size/{side}") or "").strip() for side in ("height", "width")]
    if all(side.isdigit() and int(side) for side in sides):
        image.size_px = (int(sides[0]), int(sides[1]))
    for number, one in enumerate(tree.findall("object"), start=1):
        where = f"{path}, object {number}"
        corners = [(one.findtext(f"bndbox/{key}") or "").strip() for key in ("xmin", "ymin", "xmax", "ymax")]
        x1, y1, x2, y2 = (_number(corner, where) for corner in corners)
        name = (one.findtext("name") or "").strip()
        if not name:
            raise ConfigError(f"{where} has no name")
        image.add((x1 - 1, y1 - 1, x2, y2), name, where)
    return image.case(filename)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{where}: '{text}' is no number of pixels")
    return value


def _read_tables(layout: BoxTableLayout, root: Path) -> list[BoxCase]:
    growing: dict[str, _Growing] = {}
    for file, split in layout.tables.items():
        path = root / file
        fields = [field for field in dict.fromkeys(re.findall(r"\{(.+?)\}", layout.image)) if field != "split"]
        needed = [*fields, *layout.corners, layout.label]
        more = [layout.patient] if layout.patient else []
        for row in read_known_table(path, needed, [*more, *(["split"] if split is None else [])], filled=more).rows:
            where = f"{path}, line {row.line}"
            name = layout.image.replace("{split}", split or row["split"])
            for column in fields:
                name = name.replace(f"{{{column}}}", row[column])
            name = os.path.normpath(path.parent.relative_to(root) / name)
            patient = row[layout.patient] if layout.patient else ""
            part = split or row["split"] or None
            if part not in (None, "train", "val", "test"):
                raise ConfigError(f"{where}, column split: '{part}'; known: train, val, test")
            image = growing.setdefault(name, _Growing(str(root / name), patient, part))
            if (image.patient, image.split) != (patient, part):
                raise ConfigError(f"{where}: image {name} has another patient or part than in a line before")
            corners, label = [row[column] for column in layout.corners], row[layout.label]
            if label in layout.no_finding or not (label or any(corners)):
                continue
            if not label or not all(corners):
                raise ConfigError(
                    f"{where}: a box needs {', '.join(layout.corners)} and {layout.label}; it has {corners}, '{label}'"
                )
            image.add([_number(corner, where) for corner in corners], label, where)
    cases = [image.case(name) for name, image in growing.items()]
    limit = layout.one_of_readers_iou
    return cases if limit is None else [merge_readers(case, limit) for case in cases]


def merge_readers(case: BoxCase, iou: float) -> BoxCase:
    """Put the boxes together that several people drew of one thing: those of a class that overlap, to their mean.

    Boxes are taken one after the other; each joins the group of its class whose mean it overlaps most, if by more than `iou`.
    """
    groups: list[list[int]] = []
    for place, name in enumerate(case.names):
        own = [group for group in groups if case.names[group[0]] == name]
        overlaps = [overlap(case.boxes[place], case.boxes[group].mean(0)) for group in own]
        if overlaps and max(overlaps) > iou:
            own[int(np.argmax(overlaps))].append(place)
        else:
            groups.append([place])
    first = [group[0] for group in groups]
    boxes = np.array([case.boxes[group].mean(0) for group in groups]).reshape(-1, 4)
    names, where = (tuple(values[place] for place in first) for values in (case.names, case.where))
    return replace(case, boxes=boxes, names=names, where=where)


def overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return intersection over union, 0 to 1, of two boxes [4]: left, top, right, bottom in pixels."""
    width, height = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]))
    shared = float(width * height)
    return shared / (float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared)


def _read_kvasir(layout: KvasirLayout, root: Path) -> list[BoxCase]:
    path = root / layout.file
    content = _read_json(path)
    cases = []
    try:
        for name, one in content.items():
            source = _inside(root, layout.image.replace("{id}", name), f"{path}, {name}")
            image = _Growing(str(source), size_px=(int(one["height"]), int(one["width"])))
            for number, box in enumerate(one["bbox"], start=1):
                corners = [float(box[key]) for key in ("xmin", "ymin", "xmax", "ymax")]
                image.add(corners, str(box["label"]), f"{path}, {name}, box {number}")
            cases.append(image.case(name))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not as Kvasir-SEG publishes it: {type(error).__name__} {error}") from error
    return cases
