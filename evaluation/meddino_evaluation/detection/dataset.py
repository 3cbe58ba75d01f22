"""A detection set as it lies on disk, its pictures, and what is refused about both before anything is learned."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from meddino.core.errors import ConfigError, VolumeError
from meddino.data.intensity import Modality
from meddino.volumes.pictures import split_source
from meddino_evaluation.adaptation.features import corpus_hashes, slice_hashes
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.classification.dataset_config import SplitName
from meddino_evaluation.classification.images import ReadingNotes, SliceStack, read_slices
from meddino_evaluation.classification.recognise import kind_of_file
from meddino_evaluation.data.case import a_few
from meddino_evaluation.detection.config import DataConfig
from meddino_evaluation.detection.layouts import BoxLayout, BoxTableLayout, CocoLayout, KvasirLayout, VocLayout
from meddino_evaluation.detection.readers import BoxCase, read_boxes
from meddino_evaluation.tasks.definition import TaskDefinition, load_task, task_names

_FEW = 5
_PARTS: tuple[SplitName, ...] = ("train", "val", "test")
_ROUNDING_PX = 1.0
"""A box that stands out by up to a pixel was rounded: it is cut, and how many were is told."""
_BANK_BYTES = 2**31


@dataclass(frozen=True)
class DetectionSet:
    """A data set of images and boxes.

    Attributes:
        name: Short name.
        cases: In the order of their names.
        classes: Names; class number i of a detector is place i - 1.
        modality: What values mean.
        has_patients: False where every image counts as a patient of its own.
        licence: Of the data.
        split_rule: How it is split, in words.
        overrides: Settings that its definition brings.
        notes: What a reader of the results must know.
    """

    name: str
    cases: tuple[BoxCase, ...]
    classes: tuple[str, ...]
    modality: Modality
    has_patients: bool
    licence: str = "not stated"
    split_rule: str = "drawn by patient"
    overrides: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_detection(data: str | TaskDefinition, root: Path | None, config: DataConfig) -> DetectionSet:
    """Open a data set by what a user wrote.

    Args:
        data: A CSV (image, x1, y1, x2, y2, label [, patient, split]), a COCO file, a folder in COCO's, VOC's or Kvasir-SEG's
            layout or with one CSV, or the name or YAML file of a task.
        root: Folder of the data, for a task.
        config: Classes, patients, modality.

    Raises:
        ConfigError: It is none of these, or the data are not as described.
    """
    path = Path(data if isinstance(data, str) else data.name)
    if isinstance(data, TaskDefinition) or data in task_names() or path.suffix in (".yaml", ".yml"):
        task = load_task(data) if isinstance(data, str) else data
        layout, folder = task.layout, root or (path.parent if path.is_file() else None)
        if not isinstance(layout, BoxLayout):
            raise ConfigError(f"task {task.name} is no detection: its data are of kind {layout.kind}")
        if folder is None:
            raise ConfigError(
                f"--data {data} is a shipped definition: give the folder of the data with --root (from {task.where})"
            )
        opened = _opened(task.name, layout, folder, task.labels, config)
        known = (task.notes,) if task.notes else ()
        return replace(
            opened,
            modality=task.modality if config.modality == "auto" else config.modality,
            licence=task.licence,
            split_rule=task.split_rule,
            overrides=task.overrides,
            notes=(*opened.notes, *known),
        )
    layout, folder = recognise(path)
    return _opened(re.sub(r"\W+", "_", path.stem), layout, folder, (), config)


def recognise(path: Path) -> tuple[BoxLayout, Path]:
    """Tell from its files what layout a folder or file is.

    Returns:
        The layout and the folder that it is about.

    Raises:
        ConfigError: It is none.
    """
    root = path if path.is_dir() else path.parent
    if path.suffix.lower() in (".csv", ".tsv"):
        return BoxTableLayout(tables={path.name: None}), root
    if path.is_file() and path.suffix.lower() == ".json":
        return CocoLayout(files={path.name: None}, images=_images_folder(root)), root
    if (root / KvasirLayout().file).is_file():
        return KvasirLayout(), root
    if (root / VocLayout().annotations).is_dir() and any((root / VocLayout().annotations).glob("*.xml")):
        lists = {f"ImageSets/Main/{part}.txt": part for part in _PARTS}
        return VocLayout(lists={file: part for file, part in lists.items() if (root / file).is_file()}), root
    tables = sorted(root.glob("*.csv")) if path.is_dir() else []
    files = sorted([*root.glob("*.json"), *root.glob("annotations/*.json")]) if path.is_dir() else []
    if len(tables) == 1:
        return BoxTableLayout(tables={tables[0].name: None}), root
    if files and not tables:
        parts = {file.relative_to(root).as_posix(): _part(file.stem) for file in files}
        return CocoLayout(files=parts, images=_images_folder(root)), root
    raise ConfigError(
        f"{path} is no detection set: expected one CSV (image, x1, y1, x2, y2, label [, patient, split]), COCO's JSON, VOC's "
        f"Annotations, Kvasir-SEG's boxes, or the name of a task; found {[one.name for one in (*tables, *files)][:_FEW]}"
    )


def _images_folder(root: Path) -> str:
    return "images" if (root / "images").is_dir() else "."


def _part(name: str) -> SplitName | None:
    return next((part for part in _PARTS if part in name.lower()), None)


def _opened(name: str, layout: BoxLayout, root: Path, declared: Sequence[str], config: DataConfig) -> DetectionSet:
    if not root.is_dir():
        raise ConfigError(f"data set {name}: no folder {root}")
    cases, of_files = read_boxes(layout, root)
    occurring = sorted({one for case in cases for one in case.names})
    classes = tuple(config.classes or declared or of_files or occurring)
    strange = sorted(set(occurring) - set(classes))
    if strange and not config.classes:
        raise ConfigError(f"data set {name}: boxes of classes that are not declared: {', '.join(strange[:_FEW])}")
    absent = [one for one in classes if one not in occurring]
    if absent or not classes:
        raise ConfigError(
            f"data set {name}: no box of class {', '.join(absent) or 'any kind'} occurs; leave it out: "
            f"data.classes=[{','.join(occurring)}]"
        )
    with_boxes = [case for case in cases if len(case.boxes)]
    if with_boxes and all(case.boxes.max() <= 1 for case in with_boxes):
        raise ConfigError(
            f"data set {name}: every box lies between 0 and 1, such as {with_boxes[0].where[0]}: "
            f"{with_boxes[0].boxes[0].tolist()}; boxes are in pixels: multiply x by the width and y by the height"
        )
    notes = []
    first = [_first_places(case) for case in cases]
    repeated = [case.where[n] for case, kept in zip(cases, first, strict=True) for n in range(len(case.names)) if n not in kept]
    if repeated:
        notes.append(f"{len(repeated)} boxes stand there more than once and count once: {a_few(repeated)}")
        cases = [_only(case, kept) for case, kept in zip(cases, first, strict=True)]
    if strange:
        notes.append(f"boxes of the classes {', '.join(strange)} are left out, as data.classes says")
        cases = [_only(case, [n for n, one in enumerate(case.names) if one in classes]) for case in cases]
    cases = [replace(case, patient=case.patient or _patient(config.patient_pattern, case.name)) for case in cases]
    has_patients = all(case.patient for case in cases)
    if not has_patients:
        notes.append("not every image has a patient: images of one patient may stand on both sides of a split")
        cases = [replace(case, patient=case.patient or case.name) for case in cases]
    modality = config.modality
    if modality == "auto":
        modality = kind_of_file(split_source(cases[0].source)[0])["modality"]
    return DetectionSet(name, tuple(cases), classes, modality, has_patients, notes=tuple(notes))


def _only(case: BoxCase, kept: Sequence[int]) -> BoxCase:
    """Return an image with some of its boxes."""
    names, where = (tuple(values[place] for place in kept) for values in (case.names, case.where))
    return replace(case, boxes=case.boxes[list(kept)], names=names, where=where)


def _first_places(case: BoxCase) -> list[int]:
    """Return where each box of a class stands for the first time."""
    first: dict[tuple[float | str, ...], int] = {}
    for place, (box, name) in enumerate(zip(case.boxes.tolist(), case.names, strict=True)):
        first.setdefault((*box, name), place)
    return list(first.values())


def _patient(pattern: str | None, name: str) -> str:
    if pattern is None:
        return ""
    found = re.search(pattern, name)
    if found is None:
        raise ConfigError(f"data.patient_pattern {pattern!r} finds nothing in the image name {name}")
    return found.group(1)


@dataclass(frozen=True)
class Sample:
    """A picture as a detector sees it.

    Attributes:
        image: Model input [C, S, S].
        boxes: float32 [n, 4] in its pixels.
        labels: Class numbers from 1.
        scale: Factors from the stored image's pixels to the input's, along x and y.
        size_px: Height and width of the stored image.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    scale: tuple[float, float]
    size_px: tuple[int, int]


class Pictures:
    """Reads cases for a backbone, kept in memory as far as two GiB go, read again beyond that.

    Args:
        backbone: Whose contract the images follow.
        dataset: Classes and modality.
        config: Size and window.

    Attributes:
        cut: Images with boxes that stood out by up to a pixel, and were cut.
        contents: Of each image that was checked, its content hashes as in a corpus's manifests.
        notes: What was assumed or left out when images were read.
    """

    def __init__(self, backbone: Backbone, dataset: DetectionSet, config: DataConfig) -> None:
        self.contract, self.dataset, self.config = backbone.contract, dataset, config
        self.cut: set[str] = set()
        self.contents: dict[str, tuple[str, ...]] = {}
        self.notes = ReadingNotes()
        self._kinds: dict[str, list[str]] = defaultdict(list)
        self._kept: dict[str, Sample] = {}
        self._bytes = 0

    def check(self, cases: Iterable[BoxCase]) -> dict[str, str]:
        """Read cases, refuse what cannot be learned from or measured, all at once, and return a hash of each one's pixels.

        Raises:
            ConfigError: Boxes lie outside their picture, pictures are of different modalities; names them.
            VolumeError: Pictures cannot be read or are empty; names them.
        """
        outside, unreadable, hashes = [], [], {}
        for case in cases:
            try:
                stack = read_image(case.source, self.dataset.modality)
            except VolumeError as error:
                unreadable.append(str(error))
                continue
            self.notes.add(case.name, stack)
            hashes[case.name] = slice_hashes(stack)[0]
            self.contents[case.name] = corpus_hashes(stack)
            self._kinds[stack.modality or {"hu": "CT values", "unit": "brightness"}[stack.kind]].append(case.name)
            outside += self._outside(case, stack)
        if unreadable:
            more = f" (and {len(unreadable) - _FEW} more)" if len(unreadable) > _FEW else ""
            raise VolumeError(f"{len(unreadable)} images cannot be used: {'; '.join(unreadable[:_FEW])}{more}")
        if outside:
            read = "".join(f"; {note}" for note in self.notes.lines())
            raise ConfigError(
                f"{len(outside)} boxes lie outside their pictures (left, top, right, lower edge): "
                f"{'; '.join(outside[:_FEW])}{read}"
            )
        if len(self._kinds) > 1:
            found = "; ".join(f"{kind}: {len(names)} images such as {names[0]}" for kind, names in sorted(self._kinds.items()))
            raise ConfigError(f"data set {self.dataset.name} mixes modalities: {found}; measure each of them by itself")
        return hashes

    def _outside(self, case: BoxCase, stack: SliceStack) -> list[str]:
        height, width = stack.values.shape[-2:]
        if case.size_px is not None and case.size_px != (height, width):
            raise ConfigError(
                f"image {case.name} is {width} x {height} px, its annotation says {case.size_px[1]} x {case.size_px[0]}: "
                "its boxes are in other pixels"
            )
        beyond = np.maximum(np.maximum(-case.boxes[:, :2], case.boxes[:, 2:] - [width, height]), 0).max(1, initial=0)
        if ((beyond > 0) & (beyond <= _ROUNDING_PX)).any():
            self.cut.add(case.name)
        return [
            f"{case.where[place]}: {case.boxes[place].tolist()} in {width} x {height} px of {case.name}"
            for place in np.flatnonzero(beyond > _ROUNDING_PX)
        ]

    def __call__(self, case: BoxCase) -> Sample:
        """Return a case as model input."""
        if case.name in self._kept:
            return self._kept[case.name]
        stack = read_image(case.source, self.dataset.modality)
        size = (int(stack.values.shape[-2]), int(stack.values.shape[-1]))
        image, scale = self._image(stack)
        boxes = torch.from_numpy(inside(case, size) * np.tile(scale, 2)).float()
        labels = torch.tensor([self.dataset.classes.index(name) + 1 for name in case.names], dtype=torch.int64)
        sample = Sample(image, boxes, labels, scale, size)
        if self._bytes + image.numel() * 4 <= _BANK_BYTES:
            self._kept[case.name] = sample
            self._bytes += image.numel() * 4
        return sample

    def _image(self, stack: SliceStack) -> tuple[Float[Tensor, "channels size size"], tuple[float, float]]:
        """Bring the longer side to the input's (bilinear, antialiased), the rest to black, and normalise."""
        values, side = stack.tensor(0, 1), self.config.image_size_px
        window = self.config.window_hu or self.contract.ct_window
        dark = 0.0
        if stack.kind == "hu":
            # Clipped first: resizing must not smear a metal implant's 3000 HU over its neighbours.
            values, dark = values.mean(1, keepdim=True).clamp(*window), window[0]
        height, width = values.shape[-2:]
        new = tuple(max(1, round(one * side / max(height, width))) for one in (height, width))
        if new != (height, width):
            values = functional.interpolate(values, size=new, mode="bilinear", align_corners=False, antialias=True)
        values = functional.pad(values, (0, side - new[1], 0, side - new[0]), value=dark)
        image = self.contract.from_ct(values, window) if stack.kind == "hu" else self.contract.from_unit(values)
        return image[0], (new[1] / width, new[0] / height)


def inside(case: BoxCase, size_px: tuple[int, int]) -> np.ndarray:
    """Return the boxes of a case cut to its picture."""
    height, width = size_px
    return np.clip(case.boxes, 0, [width, height, width, height])


def read_image(source: str, modality: Modality) -> SliceStack:
    """Read one picture, or one slice of a volume.

    Args:
        source: As `classification.images.read_slices`; `volume.nii.gz#12` is slice 12 (from 0) of a volume, whose pixels
            are counted with the patient's right at the left and the front on top (LPS order).
        modality: Of the data set.

    Raises:
        VolumeError: It cannot be read, has no such slice, or is empty (all of one value).
    """
    path, key = split_source(source)
    if not key.isdigit():
        stack = read_slices(source, modality)
        if len(stack.values) > 1:
            raise VolumeError(f"image {source} holds {len(stack.values)} slices: name one of them, {source}#0 being the first")
        return stack
    volume = _volume(str(path), modality)
    if int(key) >= len(volume.values):
        raise VolumeError(f"image {source}: the volume has the slices 0 to {len(volume.values) - 1}")
    slice_ = volume.values[int(key)][None]
    if slice_.min() == slice_.max():
        raise VolumeError(f"image {source} is constant: every value is {slice_.flat[0]}")
    return replace(volume, values=slice_)


@lru_cache(maxsize=2)
def _volume(name: str, modality: Modality) -> SliceStack:
    return read_slices(name, modality)
