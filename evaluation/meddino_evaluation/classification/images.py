"""Images and volumes of strangers: pictures, DICOM, NIfTI, NumPy arrays, MATLAB 7.3. No pickle, no surprise in memory."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meddino.core.errors import VolumeError
from meddino_evaluation.data.volumes import read_volume, turn_to_lps

MAX_PIXELS = 2**28
"""A header that promises more pixels in one 2D image is refused before memory is taken."""
MAX_VOXELS = 2**32

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_LOW_PERCENTILE, _HIGH_PERCENTILE = 0.5, 99.5


@dataclass(frozen=True)
class SliceStack:
    """One or more slices as they were stored.

    Attributes:
        values: [S, C, H, W], the file's own data type; C is 1 or 3.
        kind: "hu": Hounsfield units. "unit": brightness that `low` and `high` bring to [0, 1].
        low: Value that becomes 0.
        high: Value that becomes 1.
    """

    values: NDArray[Any]
    kind: Literal["hu", "unit"]
    low: float = 0.0
    high: float = 1.0

    def tensor(self, start: int, stop: int) -> Tensor:
        """Return slices [n, C, H, W] as float32: Hounsfield units, or brightness in [0, 1]."""
        values = torch.from_numpy(np.ascontiguousarray(self.values[start:stop]).astype(np.float32))
        if self.kind == "hu":
            return values
        return ((values - self.low) / max(self.high - self.low, 1e-12)).clamp(0, 1)


def read_slices(source: str, modality: Literal["ct", "image"]) -> SliceStack:
    """Read a case.

    Args:
        source: A file; `file.npz#name` for one array of an npz, `file.npz#name#i` for item i of that array,
            `file.mat#path` for one of a MATLAB file; a folder for a DICOM series.
        modality: "ct": values are Hounsfield units. "image": brightness; 8 and 16 bit pictures by their full range,
            everything else (MRI, DICOM radiographs without a window) by its 0.5th and 99.5th percentile.

    Raises:
        VolumeError: Missing, unreadable, too large, not finite, or all of one value; names the file.
    """
    name, _, key = source.partition("#")
    path = Path(name)
    try:
        stack = _read(path, key, modality)
    except VolumeError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SyntaxError, zipfile.BadZipFile, EOFError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise VolumeError(f"image {source} cannot be read: {reason}") from error
    if np.issubdtype(stack.values.dtype, np.floating) and not np.isfinite(stack.values).all():
        raise VolumeError(f"image {source} holds values that are not finite (NaN or infinity)")
    if not stack.values.size or stack.values.min() == stack.values.max():
        raise VolumeError(
            f"image {source} is constant: every value is {stack.values.flat[0] if stack.values.size else 'missing'}"
        )
    return stack


def _read(path: Path, key: str, modality: Literal["ct", "image"]) -> SliceStack:
    lower = path.name.lower()
    if path.is_dir():
        return _dicom_series(path)
    if not path.is_file():
        raise VolumeError(f"image {path} does not exist")
    if lower.endswith(PICTURE_SUFFIXES):
        return _picture(path, modality)
    if lower.endswith(VOLUME_SUFFIXES):
        array, geometry = read_volume(path)
        return _stack(turn_to_lps(geometry).apply(array)[:, None], modality)
    if lower.endswith((".npz", ".npy")):
        return _stack(_channels_first(_array(path, key)), modality)
    if lower.endswith(".mat"):
        return _stack(_matlab(path, key)[None, None], modality)
    return _dicom(path)


def _stack(values: NDArray[Any], modality: Literal["ct", "image"]) -> SliceStack:
    if modality == "ct":
        return SliceStack(values, "hu")
    if values.dtype == np.uint8:
        return SliceStack(values, "unit", 0.0, 255.0)
    low, high = np.percentile(values, [_LOW_PERCENTILE, _HIGH_PERCENTILE])
    if low == high:
        low, high = float(values.min()), float(values.max())
    return SliceStack(values, "unit", float(low), float(high))


def _picture(path: Path, modality: Literal["ct", "image"]) -> SliceStack:
    from PIL import Image

    with Image.open(path) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise VolumeError(f"image {path} is {picture.width} x {picture.height}; at most {MAX_PIXELS} pixels are read")
        if picture.mode in ("I;16", "I;16B", "I"):
            values = np.asarray(picture)
            if modality == "ct":
                return SliceStack(values[None, None], "hu")
            return SliceStack(values[None, None], "unit", 0.0, 65535.0)
        grey = picture.mode in ("L", "1", "LA")
        pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    values = pixels[None] if grey else pixels.transpose(2, 0, 1)
    # A photograph of a CT slice is brightness, whatever it shows: its Hounsfield units are gone.
    return SliceStack(values[None], "unit", 0.0, 255.0)


def _dicom(path: Path) -> SliceStack:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        file = pydicom.dcmread(path)
    except InvalidDicomError as error:
        raise VolumeError(f"image {path} is of no known kind: no picture, volume, array or DICOM file") from error
    frames = int(getattr(file, "NumberOfFrames", 1) or 1)
    if int(file.Rows) * int(file.Columns) > MAX_PIXELS or int(file.Rows) * int(file.Columns) * frames > MAX_VOXELS:
        raise VolumeError(f"image {path}: {frames} x {file.Rows} x {file.Columns} values are more than are read")
    pixels = file.pixel_array.reshape(frames, 1, int(file.Rows), int(file.Columns)).astype(np.float32)
    values = pixels * float(getattr(file, "RescaleSlope", 1) or 1) + float(getattr(file, "RescaleIntercept", 0) or 0)
    if getattr(file, "Modality", "") == "CT":
        return SliceStack(values, "hu")
    if getattr(file, "PhotometricInterpretation", "") == "MONOCHROME1":
        values = values.max() + values.min() - values
    return _stack(values, "image")


def _dicom_series(folder: Path) -> SliceStack:
    import SimpleITK as sitk

    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    if not names:
        raise VolumeError(f"folder {folder} holds no DICOM series")
    parts = [_dicom(Path(name)) for name in names]
    shapes = {part.values.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise VolumeError(f"folder {folder}: slices of different sizes {sorted(shapes)}")
    values = np.concatenate([part.values for part in parts])
    return SliceStack(values, "hu") if parts[0].kind == "hu" else _stack(values, "image")


def _array(path: Path, key: str) -> NDArray[Any]:
    if path.suffix == ".npy":
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return _checked(mapped, str(path))
    name, _, item = key.partition("#")
    with np.load(path, allow_pickle=False) as archive:
        if name not in archive.files:
            raise VolumeError(f"image {path}#{key}: the file holds {', '.join(archive.files[:8])}, not '{name}'")
        _check_npz_size(path, name)
        array: NDArray[Any] = archive[name]
    return _checked(array[int(item)] if item else array, f"{path}#{key}")


def _check_npz_size(path: Path, name: str) -> None:
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo(f"{name}.npy").file_size
    if size > MAX_VOXELS * 4:
        raise VolumeError(f"array {path}#{name} unpacks to {size} bytes; that is more than is read")


def _checked(array: NDArray[Any], where: str) -> NDArray[Any]:
    if array.ndim not in (2, 3, 4) or array.size > MAX_VOXELS or not np.issubdtype(array.dtype, np.number):
        raise VolumeError(f"array {where}: shape {array.shape} of {array.dtype} is no image or volume")
    return array


def _channels_first(array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim == 2:
        return array[None, None]
    if array.ndim == 3:
        return array.transpose(2, 0, 1)[None] if array.shape[-1] == 3 else array[:, None]
    return array.transpose(0, 3, 1, 2) if array.shape[-1] in (1, 3) else array


def _matlab(path: Path, key: str) -> NDArray[Any]:
    return np.asarray(read_matlab(path, key)).T  # MATLAB stores columns first


def read_matlab(path: Path, key: str) -> NDArray[Any]:
    """Read one array of a MATLAB 7.3 (HDF5) file.

    Raises:
        VolumeError: h5py is not installed, the file is none, or has no such array.
    """
    try:
        import h5py
    except ImportError as error:
        raise VolumeError(f"{path} is a MATLAB 7.3 file; reading it needs h5py: pip install 'meddino[matlab]'") from error
    with h5py.File(path, "r") as file:
        if key not in file or not isinstance(file[key], h5py.Dataset):
            raise VolumeError(f"{path} has no array '{key}'")
        if file[key].size > MAX_PIXELS:
            raise VolumeError(f"{path}: '{key}' has {file[key].size} values; at most {MAX_PIXELS} are read")
        values: NDArray[Any] = file[key][()]
        return values
