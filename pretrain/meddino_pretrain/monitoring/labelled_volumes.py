"""Which volumes of a labelled data set a corpus holds, by the content of their voxels.

A data set is taken for the volumes in its folder, whatever its layout, and those that its cases.csv names elsewhere: only
`meddino-eval` knows layouts.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.core.logging import get_logger
from meddino.data.content import volume_hash
from meddino.data.corpus import Corpus
from meddino.data.overlap import volume_hashes
from meddino.data.stored_values import stored_type
from meddino.distributed.collectives import all_gather_strings, rank, world_size
from meddino.volumes.archives import files_below
from meddino.volumes.file_kinds import is_companion, volume_suffix
from meddino.volumes.native import use_one_thread
from meddino.volumes.orientation import to_axial_lps
from meddino.volumes.pictures import PICTURE_ERRORS, is_picture, read_picture
from meddino.volumes.read import FoundSeries, find_series, read_volume
from meddino.volumes.volume import Planes

TABLE_FILE = "cases.csv"
LABEL_FOLDERS = ("label", "mask")  # how the names of folders begin that hold label maps and no images
_NEAREST_AXES_DEG = 180.0  # axes are turned and nothing is resampled: a voxel between two others is in no corpus
_INT16 = np.iinfo(np.int16)
logger = get_logger(__name__)

Source = Path | FoundSeries


@dataclass(frozen=True)
class LabelledVolumes:
    """What a data set's folder holds.

    Attributes:
        count: Volumes and pictures, those included that could not be read.
        seen: Those that the corpus holds, as paths.
    """

    count: int
    seen: list[str]


def labelled_volumes(data: Path, corpus: Corpus) -> LabelledVolumes:
    """Compare every volume of a data set with a corpus. Every process has to call it: each reads a part.

    Args:
        data: The data set's folder.
        corpus: Its volumes.parquet lists what it holds, duplicates included.
    """
    use_one_thread()  # training forks workers later, and a fork takes no thread along
    found = _sources(data)
    known = volume_hashes(corpus) if found else frozenset()
    seen = []
    for source in found[rank() :: world_size()]:
        name = str(source.files[0] if isinstance(source, FoundSeries) else source)
        try:
            hashes = _hashes(source)
        except (VolumeError, OSError, *PICTURE_ERRORS) as error:
            logger.warning("%s could not be compared with the corpus: %s", name, " ".join(str(error).split()))
            continue
        if hashes & known:
            seen.append(name)
    return LabelledVolumes(len(found), sorted(all_gather_strings(seen)))


def _sources(data: Path) -> list[Source]:
    """Return the files that hold volumes and the DICOM series; pictures where there are neither."""
    roots = [data, *_named_elsewhere(data)]
    files = [file for root in roots for file in files_below(root) if not _is_label(file, root)]
    volumes: list[Source] = [file for file in files if volume_suffix(file.name) and not is_companion(file.name)]
    series = [one for root in roots for one in find_series(root) if one.stack is not None and not one.problem]
    volumes += [one for one in series if not any(_is_label(one.files[0], root) for root in roots)]
    return volumes or [file for file in files if is_picture(file.name)]


def _is_label(file: Path, root: Path) -> bool:
    inside = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else ()
    return any(part.lower().startswith(LABEL_FOLDERS) for part in inside)


def _named_elsewhere(data: Path) -> list[Path]:
    """Return the images outside of a data set's folder that its cases.csv names; several of a case stand with ; between."""
    table = data / TABLE_FILE
    if not table.is_file():
        return []
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        named = [data / text for row in csv.DictReader(stream) for text in (row.get("image") or "").split(";") if text]
    return sorted({path for path in named if path.exists() and not path.resolve().is_relative_to(data.resolve())})


def _hashes(source: Source) -> set[str]:
    """Return the content hashes under which a corpus can hold a volume: as CT, or in its own numbers."""
    if isinstance(source, Path) and is_picture(source.name):
        return _hashes_of(_picture(source))
    volume = read_volume(source) if isinstance(source, Path) else source.read()
    axial, _ = to_axial_lps(volume, _NEAREST_AXES_DEG)
    return _hashes_of(axial.planes)


def _picture(path: Path) -> NDArray[Any]:
    """Return a picture as a volume of one slice; one whose three colours are alike was grey."""
    values = np.moveaxis(read_picture(path).values, 1, -1)
    return values[..., 0] if (values == values[..., :1]).all() else values


def _hashes_of(planes: Planes) -> set[str]:
    kinds = {np.dtype(np.int16), stored_type(planes.dtype)}
    return {volume_hash((_stored(planes[z], kind) for z in range(len(planes))), len(planes)) for kind in kinds}


def _stored(plane: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    """Return a slice as a corpus stores it: whole numbers of CT are clipped to what int16 holds."""
    if kind == np.int16 and plane.dtype != np.int16:
        plane = np.clip(np.nan_to_num(np.rint(plane)), _INT16.min, _INT16.max)
    return plane.astype(kind)
