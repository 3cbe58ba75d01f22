"""Images of strangers that are no 3D volumes: pictures, NumPy arrays, MATLAB 7.3, single DICOM pictures. No pickle is run."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import VolumeError

MAX_PIXELS = 2**28
"""A header that promises more pixels in one 2D image is refused before memory is taken."""
MAX_VOXELS = 2**32
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
ARRAY_SUFFIXES = (".npz", ".npy", ".mat")
# What the libraries behind these formats raise for damaged files.
PICTURE_ERRORS = (ValueError, KeyError, RuntimeError, SyntaxError, zipfile.BadZipFile, EOFError)


@dataclass(frozen=True)
class Picture:
    """One or more 2D images as they were stored.

    Attributes:
        values: [S, C, H, W], the file's own type; C is 1 or 3. MONOCHROME1 is turned over, so that more is brighter.
        value_range: Values of black and white where the file's type says them, else None.
        modality: DICOM's code where the file says it, else "".
    """

    values: NDArray[Any]
    value_range: tuple[float, float] | None = None
    modality: str = ""


def is_picture(name: str) -> bool:
    """Tell by its name whether a file is a picture; not what macOS leaves beside one."""
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("._")


def read_picture(path: Path, key: str = "") -> Picture:
    """Read a picture, an array or a DICOM file.

    Args:
        path: The file.
        key: `name` or `name#i` of an array in an .npz, the path of one in a .mat.

    Raises:
        VolumeError: Too large, of no known kind, or without such an array.
        OSError, PICTURE_ERRORS: It cannot be read.
    """
    lower = path.name.lower()
    if lower.endswith(PICTURE_SUFFIXES):
        return _picture(path)
    if lower.endswith((".npz", ".npy")):
        return Picture(_channels_first(_array(path, key)))
    if lower.endswith(".mat"):
        return Picture(np.asarray(read_matlab(path, key)).T[None, None])  # MATLAB stores columns first
    return _dicom(path)


def _picture(path: Path) -> Picture:
    from PIL import Image

    with Image.open(path) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise VolumeError(f"image {path} is {picture.width} x {picture.height}; at most {MAX_PIXELS} pixels are read")
        if picture.mode in ("I;16", "I;16B", "I"):
            return Picture(np.asarray(picture)[None, None], (0.0, 65535.0))
        grey = picture.mode in ("L", "1", "LA")
        pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    return Picture((pixels[None] if grey else pixels.transpose(2, 0, 1))[None], (0.0, 255.0))


def _dicom(path: Path) -> Picture:
    from meddino.volumes.dicom.elements import integer, number, read_elements, text
    from meddino.volumes.dicom.stored_values import open_frames

    tags = ["SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "RescaleSlope"]
    tags += ["RescaleIntercept", "PhotometricInterpretation"]
    dataset = read_elements(path, tags, lambda dataset: dataset if "Rows" in dataset else None)
    if dataset is None:
        raise VolumeError(f"image {path} is of no known kind: no picture, volume, array or DICOM file")
    rows, cols, count = integer(dataset, "Rows"), integer(dataset, "Columns"), max(integer(dataset, "NumberOfFrames", 1), 1)
    if rows * cols > MAX_PIXELS or rows * cols * count > MAX_VOXELS:
        raise VolumeError(f"image {path}: {count} x {rows} x {cols} values are more than are read")
    if integer(dataset, "SamplesPerPixel", 1) != 1:
        raise VolumeError(f"image {path} is a DICOM colour picture; export it as PNG or TIFF")
    frames = open_frames(path)
    stored = [None if frames is None else frames[index] for index in range(count)]
    if any(frame is None or frame.shape != (rows, cols) for frame in stored):
        raise VolumeError(f"image {path}: its pixels cannot be read (truncated, damaged or an unknown compression)")
    values = np.stack([frame for frame in stored if frame is not None])[:, None].astype(np.float32)
    values = values * (number(dataset, "RescaleSlope", 1) or 1.0) + number(dataset, "RescaleIntercept")
    if text(dataset, "PhotometricInterpretation") == "MONOCHROME1":
        values = values.max() + values.min() - values
    return Picture(values, None, text(dataset, "Modality"))


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
