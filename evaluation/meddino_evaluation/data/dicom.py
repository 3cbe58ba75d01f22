"""DICOM series of one folder tree, read with SimpleITK in the order of their positions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.volumes.geometry import Geometry, geometry_from_xyz
from meddino_evaluation.data.volumes import MAX_VOXELS


@dataclass(frozen=True)
class DicomSeries:
    """Files of one series, in the order of their positions along the scan."""

    files: tuple[str, ...]

    def read(self) -> tuple[NDArray[Any], Geometry]:
        """Return the volume [Z, Y, X] (slice z is file z) and its geometry.

        Raises:
            VolumeError: It cannot be read, or its slices are not evenly spaced.
        """
        where = f"DICOM series of {Path(self.files[0]).parent} ({len(self.files)} files)"
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(list(self.files))
        try:
            single = sitk.ImageFileReader()
            single.SetFileName(self.files[0])
            single.ReadImageInformation()
            if int(np.prod(single.GetSize(), dtype=np.int64)) * len(self.files) > MAX_VOXELS:
                raise VolumeError(f"{where}: more than {MAX_VOXELS} voxels")
            image = reader.Execute()
        except RuntimeError as error:
            raise VolumeError(f"{where} cannot be read: {str(error).splitlines()[-1][:200]}") from error
        if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
            raise VolumeError(f"{where} is no volume of grey values")
        geometry = geometry_from_xyz(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
        return sitk.GetArrayFromImage(image), geometry


def find_series(folder: Path) -> list[DicomSeries]:
    """Return every series in a folder and those below it, ordered by folder and series."""
    found = []
    for place in sorted([folder, *(path for path in folder.rglob("*") if path.is_dir())]):
        for series_id in sorted(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(place))):
            names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(place), series_id)
            if names:
                found.append(DicomSeries(tuple(names)))
    return found
