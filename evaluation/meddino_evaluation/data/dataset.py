"""A labelled data set whatever its layout on disk: cases with their files, patients and labels."""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import ConfigError, VolumeError
from meddino.core.files import sha256_file
from meddino.core.logging import get_logger
from meddino.data.intensity import Modality
from meddino.volumes.dicom.structures import read_structures, structure_names
from meddino.volumes.geometry import Geometry
from meddino.volumes.orientation import turn_to_lps
from meddino.volumes.pictures import is_picture
from meddino.volumes.read import read_geometry, read_label_map, read_volume
from meddino_evaluation.data.case import LabelMapCase, doubtful_patients
from meddino_evaluation.data.columns import read_known_table
from meddino_evaluation.data.labels import LabelScheme
from meddino_evaluation.data.pictures import picture_geometry, pixel_grid, read_mask_picture, read_planes

PATIENTS_FILE = "patients.csv"
_log = get_logger(__name__)

_MR_NAME = re.compile(r"(mri?|t1|t2|pd|dwi|adc|swi|flair|cine|lge|gre|tse)(?![a-z]{3})", re.IGNORECASE)


def modality_of(channel_names: Sequence[str]) -> Modality:
    """Return the modality that the names of channels say: MR where all name it or a sequence of it, else CT."""
    return "mr" if channel_names and all(_MR_NAME.match(name) for name in channel_names) else "ct"


@dataclass(frozen=True)
class LabelledDataset:
    """Cases and what their labels mean.

    Attributes:
        name: For tables.
        root: Folder it was read from.
        cases: Labelled cases for training and folds, sorted by name.
        test_cases: A held-out test part with labels (imagesTs and labelsTs), or empty.
        labels: Meaning of the label values.
        channel_names: One a channel.
        modality: What the images' values mean.
        flat: Cases are pictures: volumes of one slice, whose colours are the channels of one file, measured in pixels.
        notes: What was left out, or is not as its description says: for the log and the report.
    """

    name: str
    root: Path
    cases: tuple[LabelMapCase, ...]
    labels: LabelScheme
    channel_names: tuple[str, ...]
    test_cases: tuple[LabelMapCase, ...] = ()
    modality: Modality = "ct"
    flat: bool = False
    notes: tuple[str, ...] = ()
    _hashes: dict[Path, str] = field(default_factory=dict, compare=False, repr=False)
    _told: set[tuple[str, str]] = field(default_factory=set, compare=False, repr=False)

    @property
    def all_cases(self) -> tuple[LabelMapCase, ...]:
        """Those of the folds and those of the test part."""
        return (*self.cases, *self.test_cases)

    def case(self, name: str) -> LabelMapCase:
        """Return a case by its name.

        Raises:
            ConfigError: There is none.
        """
        for case in self.all_cases:
            if case.name == name:
                return case
        raise ConfigError(f"data set {self.name} has no case '{name}'; it has {[case.name for case in self.cases][:10]} ...")

    def read_images(self, case: LabelMapCase, channels: Sequence[int]) -> tuple[NDArray[Any], Geometry]:
        """Read the chosen channels of a case as [C, Z, Y, X] in the files' own axis order.

        Raises:
            VolumeError: A file is unreadable or the channels lie on different grids.
        """
        if self.flat:
            planes = read_planes(case.images[0], len(self.channel_names))
            return planes, pixel_grid(*planes.shape[2:])
        arrays, grid = [], None
        for channel in channels:
            volume = read_volume(case.images[channel])
            if volume.irregular:
                raise VolumeError(f"case {case.name}: {case.images[channel].name}: {volume.irregular}")
            geometry = volume.geometry
            if grid is not None and not grid.matches(geometry):
                raise VolumeError(f"case {case.name}: {case.images[channel].name} lies on another grid than channel 0")
            grid = grid or geometry
            arrays.append(volume.voxels)
        if grid is None:
            raise ConfigError("no channel chosen")
        return np.stack(arrays), grid

    def read_label(self, case: LabelMapCase, grid: Geometry) -> NDArray[np.int32]:
        """Read the label map of a case [Z, Y, X]: values checked, ignored voxels marked.

        Raises:
            VolumeError: It is missing, holds unknown values, or lies on another grid than the image.
        """
        if case.label is None or not case.label.is_file():
            raise VolumeError(f"case {case.name}: its label map {case.label or ''} is missing")
        if structure_names(case.label) is not None:
            found = read_structures(case.label, grid, self.labels.names)
            labels, notes = self.labels.from_structures(found.masks, grid.shape, str(case.label))
            self._tell(case, (*found.notes, *notes))
            return labels
        if is_picture(case.label.name):
            values = read_mask_picture(case.label)
            geometry = pixel_grid(*values.shape[1:])
        else:
            values, geometry = read_label_map(case.label)
        check_same_grid(grid, geometry, case.name, case.label)
        return self.labels.check(values, str(case.label))

    def geometry(self, case: LabelMapCase) -> Geometry:
        """Return the grid of a case from its first file's header."""
        return picture_geometry(case.images[0]) if self.flat else read_geometry(case.images[0])

    def files(self, case: LabelMapCase, channels: Sequence[int]) -> tuple[Path, ...]:
        """Return the files that hold some channels."""
        return case.images if self.flat else tuple(case.images[channel] for channel in channels)

    def _tell(self, case: LabelMapCase, notes: Sequence[str]) -> None:
        for note in notes:
            if (case.name, note) not in self._told:
                self._told.add((case.name, note))
                _log.warning("case %s: %s", case.name, note)

    def file_hash(self, path: Path) -> str:
        """SHA-256 of a file of the data set, computed once."""
        if path not in self._hashes:
            self._hashes[path] = _hash(path)
        return self._hashes[path]

    def data_hash(self, cases: Sequence[LabelMapCase]) -> str:
        """Name some cases by the bytes of their images and label maps, independent of folders and order."""
        digest = hashlib.sha256()
        for case in sorted(cases, key=lambda item: item.name):
            for path in (*case.images, *([case.label] if case.label else [])):
                digest.update(f"{case.name}\0{path.name}\0{self.file_hash(path)}\n".encode())
            if case.label is not None and structure_names(case.label) is not None:
                digest.update(f"{self.labels.names}\n".encode())  # found by their names, where a label map has values
        return digest.hexdigest()


def _hash(path: Path) -> str:
    if path.is_file():
        return sha256_file(path)
    return hashlib.sha256("".join(sorted(map(sha256_file, filter(Path.is_file, path.rglob("*"))))).encode()).hexdigest()


def check_same_grid(
    image: Geometry, label: Geometry, case: str, path: Path, first: str = "image", second: str = "label map"
) -> None:
    """Refuse a label map that lies elsewhere than its image, or than the label map that it is compared with.

    Args:
        image: Grid of the image.
        label: Grid of the label map.
        case: Its name.
        path: The label map.
        first: What the one is, for the message.
        second: What the other is.

    Raises:
        VolumeError: Says how the grids differ.
    """
    if image.matches(label, tolerance_mm=0.1):
        return
    if is_picture(path.name):
        raise VolumeError(
            f"case {case}: mask {path.name} has {label.shape[1]} x {label.shape[2]} pixels, its image {image.shape[1]} x "
            f"{image.shape[2]}"
        )
    turned = ""
    if not np.allclose(image.axes, label.axes, atol=1e-3):
        turned = f"; their directions differ: {first} {_directions(image)}, {second} {_directions(label)}"
    raise VolumeError(
        f"case {case}: {first} and {second} {path.name} lie on different grids: {first} {list(image.shape)} voxels of "
        f"{np.round(image.spacing_mm, 4).tolist()} mm at {np.round(image.origin_mm, 2).tolist()}, "
        f"{second} {list(label.shape)} of {np.round(label.spacing_mm, 4).tolist()} mm at "
        f"{np.round(label.origin_mm, 2).tolist()}; resample one onto the other"
        f"{turned}"
    )


def in_orientation_of(label: NDArray[np.int32], geometry: Geometry, wanted: Geometry) -> NDArray[np.int32] | None:
    """Return a label map with its axes reordered and flipped as those of another grid; None where the grids differ in more.

    Args:
        label: [Z, Y, X].
        geometry: Its grid.
        wanted: The other; corners may lie 0.1 mm apart.
    """
    mine, other = turn_to_lps(geometry), turn_to_lps(wanted)
    if not geometry.turned(mine.order, mine.flips).matches(wanted.turned(other.order, other.flips), tolerance_mm=0.1):
        return None
    return other.undo(mine.apply(label))


def _directions(geometry: Geometry) -> list[list[float]]:
    return np.round(geometry.axes, 3).tolist()  # type: ignore[no-any-return]


def check_grids(dataset: LabelledDataset) -> None:
    """Compare the headers of every image and label map, and read drawn structures, before anything long starts.

    Raises:
        VolumeError: A file is missing or unreadable, or grids differ.
    """
    for case in dataset.all_cases:
        grid = dataset.geometry(case)
        if case.label is None or not case.label.is_file():
            raise VolumeError(f"case {case.name}: its label map {case.label or ''} is missing")
        if is_picture(case.label.name):
            check_same_grid(grid, picture_geometry(case.label), case.name, case.label)
        elif structure_names(case.label) is not None:
            dataset.read_label(case, grid)
        else:
            check_same_grid(grid, read_geometry(case.label), case.name, case.label)


def with_patients(dataset: LabelledDataset, pattern: str | None) -> LabelledDataset:
    """Say which cases belong to one patient.

    Args:
        dataset: Cases that are each their own patient so far.
        pattern: Regular expression whose first group, found in the case name, is the patient. None reads `patients.csv`
            (columns case, patient and, if wanted, site) where the data set has one.

    Raises:
        ConfigError: The pattern is wrong or does not match a case, or the file lacks a case.
    """
    if pattern is not None:
        return _map_cases(dataset, _by_pattern(pattern))
    table = dataset.root / PATIENTS_FILE
    if not table.is_file():
        return dataset
    columns = ("case", "patient")
    found = read_known_table(table, columns, ("site",), filled=columns, unique="case")
    rows = {row["case"]: row for row in found.rows}

    def assign(case: LabelMapCase) -> LabelMapCase:
        row = rows.get(case.name)
        if row is None:
            raise ConfigError(f"{table}: no row for case '{case.name}'; it needs the columns case, patient [, site]")
        return replace(case, patient=row["patient"], site=row["site"] or case.site)

    return _map_cases(dataset, assign)


@functools.cache
def _tell_once(what: str) -> None:
    """Say something once a process, however many models are compared on the data."""
    _log.warning("%s", what)


def _by_pattern(pattern: str) -> Callable[[LabelMapCase], LabelMapCase]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"data.patient_pattern {pattern!r} is no regular expression: {error}") from error
    if expression.groups < 1:
        raise ConfigError(
            f"data.patient_pattern {pattern!r} has no group; put the patient's part in brackets, e.g. '^([^_]+)_'"
        )

    def assign(case: LabelMapCase) -> LabelMapCase:
        found = expression.search(case.name)
        if found is None or not found.group(1):
            raise ConfigError(f"data.patient_pattern {pattern!r} does not match case '{case.name}'")
        return replace(case, patient=found.group(1))

    return assign


def _map_cases(dataset: LabelledDataset, assign: Callable[[LabelMapCase], LabelMapCase]) -> LabelledDataset:
    cases, test_cases = (tuple(assign(case) for case in part) for part in (dataset.cases, dataset.test_cases))
    doubts = doubtful_patients([*cases, *test_cases])
    for doubt in doubts:
        _tell_once(f"data set {dataset.name}: {doubt}")
    return replace(dataset, cases=cases, test_cases=test_cases, notes=(*dataset.notes, *doubts))
