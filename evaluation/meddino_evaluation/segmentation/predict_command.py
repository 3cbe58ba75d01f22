"""`meddino-eval predict`: label maps of new volumes or DICOM series, as NIfTI or DICOM-SEG."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import meddino
from meddino.core.errors import ConfigError, MedDINOError, VolumeError
from meddino.core.files import write_json
from meddino.core.logging import get_logger
from meddino.volumes.channels import case_names
from meddino.volumes.file_kinds import is_companion
from meddino.volumes.read import FoundSeries, find_series, read_volume
from meddino.volumes.volume import Volume
from meddino.volumes.writing import write_label_map
from meddino_evaluation.data.prepare import prepare_volume
from meddino_evaluation.metrics.score_command import ENDINGS
from meddino_evaluation.segmentation.inference.bundle import Bundle, load_bundle

logger = get_logger(__name__)


@dataclass(frozen=True)
class Input:
    """One volume to predict: files (one a channel), or a DICOM series."""

    name: str
    files: tuple[Path, ...] = ()
    series: FoundSeries | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return self.files if self.series is None else self.series.files

    def read(self) -> list[Volume]:
        """Return its channels, on one grid that says where every voxel lies.

        Raises:
            VolumeError: They are unreadable, or lie on no grid or on several.
        """
        try:
            parts = [self.series.read()] if self.series is not None else [read_volume(path) for path in self.files]
        except VolumeError as error:
            raise VolumeError(f"case {self.name}: {error}") from error
        for part in parts:
            if part.irregular:
                raise VolumeError(f"case {self.name}: {part.irregular}: a label map could not say where its slices lie")
            if not parts[0].geometry.matches(part.geometry):
                raise VolumeError(f"case {self.name}: its channels lie on different grids")
        return parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval predict`."""
    parser.add_argument("--results", required=True, type=Path, help="--out folder of a finished meddino-eval segment")
    parser.add_argument("--input", required=True, type=Path, help="volume, folder of volumes, or folder of DICOM series")
    parser.add_argument("--out", required=True, type=Path, help="folder for the label maps")
    parser.add_argument("--fold", type=int, default=0, help="whose network")
    parser.add_argument("--seed", type=int, default=0, help="whose network")
    parser.add_argument("--model", help="where the encoder is now, if it has moved")
    parser.add_argument("--format", choices=("nifti", "dicomseg"), default="nifti", help="dicomseg needs DICOM input")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval predict`."""
    bundle = load_bundle(arguments.results, arguments.fold, arguments.seed, arguments.model)
    inputs = list(find_inputs(arguments.input, bundle.channels))
    if arguments.format == "dicomseg" and any(item.series is None for item in inputs):
        raise ConfigError("--format dicomseg needs DICOM series as input: a DICOM-SEG refers to the slices it was made from")
    failed: dict[str, str] = {}
    done: dict[str, dict[str, Any]] = {}
    for item in inputs:
        try:
            done[item.name] = predict_one(item, bundle, arguments.out, arguments.format)
        except VolumeError as error:
            logger.warning("%s", error)
            failed[item.name] = str(error)
    if len(failed) == len(inputs):
        raise MedDINOError(f"none of {len(inputs)} volumes could be predicted: {next(iter(failed.values()))}")
    write_json(arguments.out / "failed.json", failed)
    write_json(arguments.out / "inputs.json", done)
    sys.stdout.write(f"{len(done)} volumes predicted, {len(failed)} could not be read (inputs.json, failed.json)\n")


def predict_one(item: Input, bundle: Bundle, out: Path, kind: str) -> dict[str, Any]:
    """Predict one volume and write it.

    Returns:
        Which files it was made from, and what reading them decided.

    Raises:
        VolumeError: It is unreadable or has another number of channels.
    """
    volumes = item.read()
    if len(volumes) < bundle.channels:
        raise VolumeError(f"case {item.name}: {len(volumes)} channels, the network reads {bundle.channels}")
    channels = np.stack([volume.voxels for volume in volumes[: bundle.channels]])
    geometry = volumes[0].geometry
    case = prepare_volume(item.name, channels, geometry, bundle.rule)
    labels = bundle.predict(case)
    if kind == "dicomseg" and item.series is not None:
        from meddino.volumes.dicom.segmentation import write_dicom_seg

        masks = {name: bundle.labels.mask(labels, number) for number, name in enumerate(bundle.labels.names)}
        files = item.series.files_of_slices()
        if len(set(files)) != len(labels):
            raise VolumeError(f"case {item.name}: a DICOM-SEG needs one readable file a slice")
        write_dicom_seg(out / f"{item.name}.dcm", masks, files, meddino.__version__)
    else:
        write_label_map(out / f"{item.name}.nii.gz", labels, geometry)
    logger.info("case %s predicted", item.name)
    notes = sorted({note for volume in volumes for note in volume.notes})
    return {"files": [str(path) for path in item.paths], "notes": notes}


def find_inputs(path: Path, channels: int) -> Iterator[Input]:
    """Find volumes (nnU-Net's <case>_0000 names are put together) or DICOM series.

    Args:
        path: Volume, folder of volumes, or folder of DICOM series.
        channels: How many the network reads: says whether four digits at the end of a name number channels.

    Raises:
        ConfigError: There is nothing.
    """
    if not path.exists():
        raise ConfigError(f"--input {path}: no such file or folder")
    if path.is_file() and path.name.endswith(ENDINGS):
        yield Input(_stem(path), (path,))
        return
    files = (
        [path for path in sorted(path.iterdir()) if path.name.endswith(ENDINGS) and not is_companion(path.name)]
        if path.is_dir()
        else []
    )
    cases = case_names(map(_stem, files), channels)
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(cases[_stem(file)], []).append(file)
    for name, members in groups.items():
        yield Input(name, tuple(members))
    # A series is numbered: its UID or description could tell who it is. inputs.json says which files it is of.
    series = [] if groups else find_series(path)
    for number, found in enumerate(series):
        yield Input(f"series_{number:03d}", series=found)
    if not groups and not series:
        raise ConfigError(f"--input {path} holds no volume ({', '.join(ENDINGS)}) and no DICOM series")


def _stem(path: Path) -> str:
    return next((path.name.removesuffix(ending) for ending in ENDINGS if path.name.endswith(ending)), path.stem)
