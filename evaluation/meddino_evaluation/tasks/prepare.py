"""A task's files as a data set that every command reads: cases.csv, labels.json, label maps; images stay where they are."""

import csv
import glob
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meddino.core.errors import ConfigError, VolumeError
from meddino.core.files import atomic_write, canonical_json, write_json, write_text
from meddino.core.logging import get_logger
from meddino.volumes.file_kinds import volume_suffix
from meddino.volumes.geometry import Geometry
from meddino.volumes.pictures import is_picture, read_picture
from meddino.volumes.read import read_geometry, read_label_map
from meddino.volumes.writing import write_label_map
from meddino_evaluation.classification.images import read_slices
from meddino_evaluation.data.layouts import LABELS_FILE, TABLE_FILE
from meddino_evaluation.data.pictures import brightness, picture_geometry, pixel_grid, read_mask_picture
from meddino_evaluation.data.splits import SPLITS_FILE
from meddino_evaluation.tasks.definition import LabelMapLayout, MaskSource, OfTask, TaskDefinition, load_task

logger = get_logger(__name__)
STAMP = "task.json"
_FIELD = re.compile(r"\{(\w+)\}")
MAX_RAW = 4095
_FEW = 5
MaskT = TypeVar("MaskT", bound=np.generic)


@dataclass(frozen=True)
class FoundCase:
    """A case of a task as its files were found.

    Attributes:
        name: Of the case, unique.
        images: One file a channel.
        masks: For each mask source of the layout the files of the case.
        fields: What the path said: patient, site, part, ...
    """

    name: str
    images: tuple[Path, ...]
    masks: tuple[tuple[Path, ...], ...]
    fields: dict[str, str]


@dataclass(frozen=True)
class TaskData:
    """Where a task lies once it is prepared.

    Attributes:
        task: Its definition.
        data: Folder that `meddino-eval segment --data` reads.
        tests: Further test sets by site, for `--test`.
        overrides: Settings of the task, for the command's config.
    """

    task: TaskDefinition
    data: Path
    tests: dict[str, Path]
    overrides: tuple[str, ...]


def prepare_task(task: TaskDefinition, root: Path, out: Path) -> TaskData:
    """Write the data set of a segmentation task, unless the same files have been prepared there before.

    Images stay where they are; only what no command could read (raw files, arrays, DICOM pictures, images larger than their
    masks) is written as pictures. Label maps are made from the masks.

    Args:
        task: Of a segmentation, or one of prompts on a segmentation's data.
        root: Folder of the published set.
        out: Folder to make.

    Raises:
        ConfigError: The task has other data, nothing is found, or a case lacks a file; named.
        VolumeError: A file is unreadable, or a mask has another size than its image.
    """
    layout, shown = data_of(task)
    cases = find_cases(shown.name, layout, root)
    sites = sorted({case.fields.get("site", "") for case in cases} - set(shown.train_sites)) if shown.train_sites else []
    tests = {site: out / "sites" / site for site in sites}
    found = TaskData(task, out, tests, (*_modality(shown), *task.overrides))
    stamp = {"task": shown.model_dump(mode="json"), "files": [_stamp(case) for case in cases]}
    digest = hashlib.sha256(canonical_json(stamp).encode()).hexdigest()
    path = out / STAMP
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("hash") == digest:
        return found
    absent = [one for one in shown.train_sites if not any(case.fields.get("site") == one for case in cases)]
    if absent:
        raise ConfigError(f"task {shown.name}: no case of the site {', '.join(absent)} below {root}")
    never = set(shown.labels)
    for folder, wanted in ((out, set(shown.train_sites)), *((folder, {site}) for site, folder in tests.items())):
        own = [case for case in cases if not wanted or case.fields.get("site", "") in wanted]
        never -= _write_set(shown, layout, own, folder)
    if never:
        logger.warning("task %s: no mask holds the labels %s; their metrics are undefined", shown.name, sorted(never))
    write_json(path, {"hash": digest, "task": shown.name, "root": str(root), "cases": len(cases)})
    logger.info("task %s: %d cases of %s in %s", shown.name, len(cases), root, out)
    return found


def data_of(task: TaskDefinition) -> tuple[LabelMapLayout, TaskDefinition]:
    """Return the layout of a task's label maps and the definition that they belong to.

    Raises:
        ConfigError: It has none.
    """
    shown = load_task(task.layout.task) if isinstance(task.layout, OfTask) else task
    if not isinstance(shown.layout, LabelMapLayout):
        raise ConfigError(f"task {task.name} is {task.kind}; only tasks with label maps are prepared for segmentation")
    return shown.layout, shown


def find_cases(name: str, layout: LabelMapLayout, root: Path) -> list[FoundCase]:
    """Find the cases of a layout below a root, sorted by name.

    Raises:
        ConfigError: There are none, two have one name, or a case lacks a channel or all its masks.
    """
    patterns = list(layout.images.values())
    cases, without = [], []
    for path, fields in _matches(root, patterns[0], layout.exclude):
        images = (path, *(root / _filled(pattern, fields) for pattern in patterns[1:]))
        lost = [one.relative_to(root).as_posix() for one in images if not one.exists()]
        if lost:
            raise ConfigError(f"task {name}: case {fields['case']} has no {', '.join(lost)} below {root}")
        masks = tuple(_masks(root, mask, fields) for mask in layout.masks)
        if any(masks):
            prefix = f"{fields['site']}_" if "site" in fields else ""
            cases.append(FoundCase(re.sub(r"[^\w.-]+", "_", prefix + fields["case"]), images, masks, fields))
        else:
            without.append(fields["case"])
    if without and not layout.optional_masks:
        raise ConfigError(f"task {name}: cases without a mask: {', '.join(without[:_FEW])} ({len(without)} in all)")
    if without:
        logger.warning("task %s: %d images have no mask and are left out: %s", name, len(without), without[:_FEW])
    if not cases:
        raise ConfigError(f"task {name}: no image {patterns[0]} below {root}")
    names = sorted(case.name for case in cases)
    twice = sorted({one for one, other in itertools.pairwise(names) if one == other})
    if twice:
        raise ConfigError(f"task {name}: two images mean the case {', '.join(twice[:_FEW])}")
    return sorted(cases, key=lambda case: case.name)


def _matches(root: Path, pattern: str, exclude: str | None) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the files that a pattern with fields means, with what its fields hold."""
    pattern = pattern.partition("#")[0]
    expression, seen = "", set[str]()
    for place, part in enumerate(_FIELD.split(pattern)):
        if place % 2 == 0:
            expression += re.escape(part)
        else:
            expression += f"(?P={part})" if part in seen else f"(?P<{part}>[^/]+)"
            seen.add(part)
    for path in sorted(root.glob(_FIELD.sub("*", pattern))):
        relative = path.relative_to(root).as_posix()
        found = re.fullmatch(expression, relative)
        if found and not path.name.startswith(".") and not (exclude and re.search(exclude, relative)):
            yield path, found.groupdict()


def _filled(pattern: str, fields: dict[str, str]) -> str:
    return _FIELD.sub(lambda match: fields[match.group(1)], pattern.partition("#")[0])


def _masks(root: Path, mask: MaskSource, fields: dict[str, str]) -> tuple[Path, ...]:
    if "*" in mask.path:
        return tuple(sorted(root.glob(_filled(mask.path, {name: glob.escape(text) for name, text in fields.items()}))))
    path = root / _filled(mask.path, fields)
    return (path,) if path.is_file() else ()


def _stamp(case: FoundCase) -> list[Any]:
    files = [*case.images, *(path for paths in case.masks for path in paths)]
    return [case.name, [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]]


def _modality(task: TaskDefinition) -> tuple[str, ...]:
    return (f"data.modality={task.modality}",)


def _write_set(task: TaskDefinition, layout: LabelMapLayout, cases: Sequence[FoundCase], folder: Path) -> set[str]:
    """Write one data set and return the labels that occur in it."""
    stream, seen = io.StringIO(), set[int]()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("case", "image", "label", "patient", "site", "part", "modality"))
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for case in cases:
        images, grid = _images(layout, case, folder)
        labels = _label_map(task, layout, case, grid)
        path = folder / "labels" / f"{case.name}.nii.gz"
        write_label_map(path, labels, grid)
        seen |= set(np.unique(labels).tolist())
        raw = case.fields.get("part", "")
        part = layout.part_values.get(raw, "train")
        parts[part].append(case.name)
        patient = case.fields.get("patient", case.name)
        image = ";".join(str(one.resolve()) for one in images)
        written = "test" if part == "test" else "train"
        label = path.relative_to(folder).as_posix()
        writer.writerow((case.name, image, label, patient, case.fields.get("site", ""), written, task.modality))
    write_text(folder / TABLE_FILE, stream.getvalue())
    named = {"background": 0} | {name: value for value, name in enumerate(task.labels, start=1)}
    write_text(folder / LABELS_FILE, json.dumps(named, indent=1) + "\n")  # in this order, which write_json would not keep
    if parts["val"]:
        write_json(folder / SPLITS_FILE, [{"train": parts["train"], "val": parts["val"]}])
    return {name for value, name in enumerate(task.labels, start=1) if value in seen}


def _images(layout: LabelMapLayout, case: FoundCase, folder: Path) -> tuple[tuple[Path, ...], Geometry]:
    """Return the files that commands read, and their grid: the published ones, or pictures made of what they cannot read."""
    first = case.images[0]
    if volume_suffix(first.name):
        return case.images, read_geometry(first)
    if is_picture(first.name) and layout.shrink == 1:
        return case.images, picture_geometry(first)
    key = next(iter(layout.images.values())).partition("#")[2]
    planes = _planes(layout, first, key)
    size, (channels, rows, cols) = layout.shrink, planes.shape
    if rows % size or cols % size:
        raise VolumeError(f"case {case.name}: {first.name} has {rows} x {cols} pixels, which {size} does not divide")
    small = planes.reshape(channels, rows // size, size, cols // size, size).mean((2, 4))
    path = folder / "images" / f"{case.name}.png"
    # Colour pictures of 16 bits are no format of Pillow's.
    wide = (small * 65535).round().astype(np.uint16)[0] if channels == 1 else (small * 255).round().astype(np.uint8)
    with atomic_write(path) as stream:
        Image.fromarray(wide if channels == 1 else wide.transpose(1, 2, 0)).save(stream, "png")
    return (path,), pixel_grid(*small.shape[1:])


def _planes(layout: LabelMapLayout, path: Path, key: str) -> NDArray[np.float64]:
    """Return an image's brightness [C, H, W] in [0, 1]."""
    if layout.raw_shape is not None:
        rows, cols = layout.raw_shape
        if path.stat().st_size != 2 * rows * cols:
            raise VolumeError(f"image {path} has {path.stat().st_size} bytes; {rows} x {cols} of 16 bits are {2 * rows * cols}")
        stored = np.fromfile(path, dtype=">u2").reshape(rows, cols)
        # Film density: 12 bits, black is bright on the light box.
        bright: NDArray[np.float64] = 1 - np.minimum(stored, MAX_RAW)[None] / MAX_RAW
        return bright
    stack = read_slices(f"{path}#{key}" if key else str(path), "image")
    if len(stack.values) != 1:
        raise VolumeError(f"image {path} holds {len(stack.values)} slices; a picture has one")
    return stack.tensor(0, 1)[0].numpy().astype(np.float64)


def _label_map(task: TaskDefinition, layout: LabelMapLayout, case: FoundCase, grid: Geometry) -> NDArray[np.int32]:
    labels = np.zeros(grid.shape, dtype=np.int32)
    for source, files in zip(layout.masks, case.masks, strict=True):
        for path in files:
            if source.label is not None:
                labels[_mask(path, source, grid, case.name)] = task.labels.index(source.label) + 1
                continue
            values = _values(path, source, grid, case.name)
            known = {value: task.labels.index(name) + 1 for name, group in source.values.items() for value in group}
            strange = sorted(set(np.unique(values).tolist()) - known.keys() - {0})
            if strange:
                raise VolumeError(f"case {case.name}: mask {path.name} holds the values {strange[:8]}; known: {sorted(known)}")
            for value, own in known.items():
                labels[values == value] = own
    return labels


def _mask(path: Path, source: MaskSource, grid: Geometry, case: str) -> NDArray[np.bool_]:
    if is_picture(path.name) or path.suffix.lower() == ".gif":
        return _sized(brightness(path)[None] > source.above, path, grid, case)
    return np.asarray(_values(path, source, grid, case) > 0)


def _values(path: Path, source: MaskSource, grid: Geometry, case: str) -> NDArray[np.int32]:
    if is_picture(path.name):
        return _sized(read_mask_picture(path), path, grid, case)
    key = source.path.partition("#")[2]
    if key:
        values = read_picture(path, key).values
        return _sized(values[:, 0].astype(np.int32), path, grid, case)
    return _sized(read_label_map(path)[0], path, grid, case)


def _sized(values: NDArray[MaskT], path: Path, grid: Geometry, case: str) -> NDArray[MaskT]:
    if values.shape != grid.shape:
        unit = "pixels" if len(values) == 1 and grid.shape[0] == 1 else "voxels"
        raise VolumeError(
            f"case {case}: mask {path.name} has {' x '.join(map(str, values.shape))} {unit}, its image "
            f"{' x '.join(map(str, grid.shape))}"
        )
    return values
