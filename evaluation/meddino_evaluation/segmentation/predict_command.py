"""`meddino-eval predict`: label maps of new volumes or DICOM series, as NIfTI or DICOM-SEG."""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import meddino
from meddino.core.errors import ConfigError, MedDINOError, VolumeError
from meddino.core.files import write_json
from meddino.core.logging import get_logger
from meddino.volumes.geometry import Geometry
from meddino.volumes.writing import write_label_map
from meddino_evaluation.data.dicom import DicomSeries, find_series
from meddino_evaluation.data.prepare import prepare_volume
from meddino_evaluation.data.volumes import read_volume
from meddino_evaluation.metrics.score_command import ENDINGS
from meddino_evaluation.segmentation.inference.bundle import Bundle, load_bundle

logger = get_logger(__name__)


@dataclass(frozen=True)
class Input:
    """One volume to predict: files (one a channel), or a DICOM series."""

    name: str
    files: tuple[Path, ...] = ()
    series: DicomSeries | None = None

    def read(self) -> tuple[NDArray[Any], Geometry]:
        """Return [C, Z, Y, X] and its geometry."""
        if self.series is not None:
            array, geometry = self.series.read()
            return array[None], geometry
        parts = [read_volume(path) for path in self.files]
        if any(not parts[0][1].matches(other) for _, other in parts[1:]):
            raise VolumeError(f"case {self.name}: its channels lie on different grids")
        return np.stack([array for array, _ in parts]), parts[0][1]


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
    inputs = list(find_inputs(arguments.input))
    if arguments.format == "dicomseg" and any(item.series is None for item in inputs):
        raise ConfigError("--format dicomseg needs DICOM series as input: a DICOM-SEG refers to the slices it was made from")
    bundle = load_bundle(arguments.results, arguments.fold, arguments.seed, arguments.model)
    failed: dict[str, str] = {}
    for item in inputs:
        try:
            predict_one(item, bundle, arguments.out, arguments.format)
        except VolumeError as error:
            logger.warning("%s", error)
            failed[item.name] = str(error)
    if len(failed) == len(inputs):
        raise MedDINOError(f"none of {len(inputs)} volumes could be predicted: {next(iter(failed.values()))}")
    write_json(arguments.out / "failed.json", failed)
    sys.stdout.write(f"{len(inputs) - len(failed)} volumes predicted, {len(failed)} could not be read (failed.json)\n")


def predict_one(item: Input, bundle: Bundle, out: Path, kind: str) -> None:
    """Predict one volume and write it.

    Raises:
        VolumeError: It is unreadable or has another number of channels.
    """
    array, geometry = item.read()
    if len(array) < bundle.channels:
        raise VolumeError(f"case {item.name}: {len(array)} channels, the network reads {bundle.channels}")
    case = prepare_volume(item.name, array[: bundle.channels], geometry, bundle.rule)
    labels = bundle.predict(case)
    if kind == "dicomseg" and item.series is not None:
        from meddino.volumes.dicom.segmentation import write_dicom_seg

        masks = {name: bundle.labels.mask(labels, number) for number, name in enumerate(bundle.labels.names)}
        write_dicom_seg(out / f"{item.name}.dcm", masks, [Path(file) for file in item.series.files], meddino.__version__)
    else:
        write_label_map(out / f"{item.name}.nii.gz", labels, geometry)
    logger.info("case %s predicted", item.name)


def find_inputs(path: Path) -> Iterator[Input]:
    """Find volumes (nnU-Net's <case>_0000 names are put together) or DICOM series.

    Raises:
        ConfigError: There is nothing.
    """
    if path.is_file():
        yield Input(_stem(path), (path,))
        return
    if not path.is_dir():
        raise ConfigError(f"--input {path}: no such file or folder")
    groups: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if file.name.endswith(ENDINGS):
            groups.setdefault(re.sub(r"_\d{4}$", "", _stem(file)), []).append(file)
    for name, files in groups.items():
        yield Input(name, tuple(files))
    found = bool(groups)
    if not groups:
        for number, series in enumerate(find_series(path)):
            # A series is numbered: its UID or description could tell who it is.
            yield Input(f"series_{number:03d}", series=series)
            found = True
    if not found:
        raise ConfigError(f"--input {path} holds no volume ({', '.join(ENDINGS)}) and no DICOM series")


def _stem(path: Path) -> str:
    return next((path.name.removesuffix(ending) for ending in ENDINGS if path.name.endswith(ending)), path.stem)
