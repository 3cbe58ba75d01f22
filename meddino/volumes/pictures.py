"""Images of strangers that are no 3D volumes: pictures, NumPy arrays, MATLAB 7.3, single DICOM pictures. No pickle is run."""

import math
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.volumes.archives import archive_of, open_file

MAX_PIXELS = 2**28
"""A header that promises more pixels in one 2D image is refused before memory is taken."""
MAX_VOXELS = 2**32
MAX_ARRAY_BYTES = 2**32
"""A larger array of an .npz, which is unpacked as a whole, is refused before memory is taken."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
ARRAYS_SUFFIX = ".npz"
ARRAY_SUFFIXES = (ARRAYS_SUFFIX, ".npy", ".mat")
MAX_PICTURES = 2**20
"""Of one array."""
_DARK = 2**13  # an eighth of what 16 bits hold: a picture below was meant for 12 bits, say
_LEAST_SIDE_PX = 8  # shorter sides are those of labels and boxes
WIDE_MODES = ("I;16", "I;16B", "I")
"""Of Pillow: grey values of 16 bits, of either order of bytes, or in 32."""
_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_EXIF_ORIENTATION = 0x0112
# What the libraries behind these formats raise for damaged files.
PICTURE_ERRORS = (ValueError, KeyError, RuntimeError, SyntaxError, zipfile.BadZipFile, EOFError)


@dataclass(frozen=True)
class Picture:
    """One or more 2D images as they were stored.

    Attributes:
        values: [S, C, H, W], the file's own type; C is 1 or 3. MONOCHROME1 is turned over, so that more is brighter.
        value_range: Values of black and white where the file's type says them, else None.
        modality: DICOM's code where the file says it, else "".
        note: What of the file was left out or looks odd, or "".
    """

    values: NDArray[Any]
    value_range: tuple[float, float] | None = None
    modality: str = ""
    note: str = ""


@dataclass(frozen=True)
class PictureArrays:
    """What an .npz holds, by the headers of its arrays.

    Attributes:
        keys: Of its pictures, as `read_picture` takes them.
        others: Arrays of other shapes: labels, boxes, names.
    """

    keys: tuple[str, ...]
    others: int


def is_picture(name: str) -> bool:
    """Tell by its name whether a file is a picture; not what macOS leaves beside one."""
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("._")


def is_picture_arrays(name: str) -> bool:
    """Tell by its name whether a file may hold several pictures as arrays."""
    return name.lower().endswith(ARRAYS_SUFFIX) and not name.startswith("._")


def split_source(source: str) -> tuple[Path, str]:
    """Split `file#key` into the file and the key, which is "" where there is none.

    A # may belong to the name of a file or folder: the longest file that is there, before a # or the end, is taken; where
    none is there, what stands before the first #.
    """
    ends = [len(source), *(place for place in range(len(source) - 1, 0, -1) if source[place] == "#")]
    there = (end for end in ends if (path := Path(source[:end])).exists() or archive_of(path) is not None)
    end = next(there, ends[-1])
    return Path(source[:end]), source[end + 1 :]


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

    try:
        with open_file(path) as stream, Image.open(stream) as picture:
            return _pixels(picture, path)
    except Image.DecompressionBombError as error:
        raise VolumeError(f"image {path} has more pixels than are read") from error


def _pixels(picture: Any, path: Path) -> Picture:
    if picture.width * picture.height > MAX_PIXELS:
        raise VolumeError(f"image {path} is {picture.width} x {picture.height}; at most {MAX_PIXELS} pixels are read")
    if picture.mode == "F":
        raise VolumeError(f"image {path} holds floating point values; a picture has 8 or 16 bits of brightness")
    notes = []
    if any(";16" in str(tile[3]) for tile in picture.tile) and picture.mode not in WIDE_MODES:
        notes.append("16 bits a colour, of which the upper 8 are taken")
    pages = getattr(picture, "n_frames", 1)
    if pages > 1:
        notes.append(f"the first of {pages} pages; the others are left out")
    turn = picture.getexif().get(_EXIF_ORIENTATION, 1)
    if turn != 1:
        notes.append(f"EXIF orientation {turn} is not applied: pixels are taken as they are stored")
    if picture.mode in WIDE_MODES:
        values = np.asarray(picture)
        if values.min(initial=0) < 0 or values.max(initial=0) > np.iinfo(np.uint16).max:
            return Picture(values[None, None], note="; ".join(notes))  # no brightness: may be Hounsfield units
        values = values.astype(np.uint16)  # of this machine's order of bytes
        if (high := int(values.max(initial=0))) < _DARK:
            notes.append(f"the largest of its 16-bit values is {high}: read as brightness from 0 to 65535, nearly black")
        if getattr(picture, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow turns over those of 8 bits alone
            values = np.iinfo(np.uint16).max - values
        return Picture(values[None, None], (0.0, 65535.0), note="; ".join(notes))
    if picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min(initial=255) < 255:
        notes.append("transparency is left out")
    grey = picture.mode in ("L", "1", "LA")
    pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    return Picture((pixels[None] if grey else pixels.transpose(2, 0, 1))[None], (0.0, 255.0), note="; ".join(notes))


def as_uint16(values: NDArray[Any], where: str = "") -> NDArray[np.uint16]:
    """Return brightness as 16 bits, whatever the file's type and order of bytes; nothing is clipped or wraps around.

    Args:
        values: Of any shape; fractions are rounded.
        where: The file, for messages; "" where its name must not be told.

    Raises:
        VolumeError: A value is below 0 or above 65535.
    """
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (low >= 0 and round(high) <= np.iinfo(np.uint16).max):
        name = f" {where}" if where else ""
        raise VolumeError(
            f"image{name} holds values from {low:g} to {high:g}; a picture has brightness from 0 to 65535 (Hounsfield units "
            "belong in a volume: NIfTI, NRRD, MetaImage or DICOM)"
        )
    return (np.rint(values) if values.dtype.kind == "f" else values).astype(np.uint16)


def lifted(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Return a DICOM picture's brightness as whole numbers from 0: its rescale may have moved it below.

    Raises:
        VolumeError: Its range is more than 16 bits hold.
    """
    return as_uint16(values - min(0.0, float(values.min())))


def _dicom(path: Path) -> Picture:
    from meddino.volumes.dicom.colour import is_colour, read_colour
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
    if is_colour(dataset):
        if 3 * rows * cols * count > MAX_VOXELS:
            raise VolumeError(f"image {path}: {count} x {rows} x {cols} x 3 values are more than are read")
        colours = read_colour(path, (count, rows, cols))
        if colours is None:
            raise VolumeError(f"image {path}: its pixels cannot be read (truncated, damaged or an unknown compression)")
        return Picture(colours.values.transpose(0, 3, 1, 2), (0.0, colours.white), text(dataset, "Modality"))
    if "FloatPixelData" in dataset:
        raise VolumeError(f"image {path} holds floating point values; a picture has whole numbers of brightness")
    frames = open_frames(path)
    stored = [None if frames is None else frames[index] for index in range(count)]
    if any(frame is None or frame.shape != (rows, cols) for frame in stored):
        raise VolumeError(f"image {path}: its pixels cannot be read (truncated, damaged or an unknown compression)")
    values = np.stack([frame for frame in stored if frame is not None])[:, None].astype(np.float32)
    slope, intercept = float(number(dataset, "RescaleSlope", 1)), number(dataset, "RescaleIntercept")
    note = ""
    if slope and slope.is_integer():
        values = values * slope + intercept
    else:  # brightness has no unit, and whole numbers of optical density, say, would be three or four
        values = -values if slope < 0 else values
        note = f"rescale slope {slope:g} is left out: brightness as it is stored"
    if text(dataset, "PhotometricInterpretation") == "MONOCHROME1":
        values = values.max() + values.min() - values
    return Picture(values, None, text(dataset, "Modality"), note)


def _array(path: Path, key: str) -> NDArray[Any]:
    if path.suffix == ".npy":
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return _checked(mapped, str(path))
    name, _, item = key.partition("#")
    array = _unpacked(path, name, _stamp(path))
    if item:
        number = int(item)
        if array.ndim < 3 or not 0 <= number < len(array):
            raise VolumeError(f"image {path}#{key}: the array has shape {array.shape} and no such item")
        array = array[number : number + 1]
    return _checked(array, f"{path}#{key}")


def _stamp(path: Path) -> tuple[int, int]:
    status = (archive_of(path) or path).stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1)  # the pictures of an array are read one after the other
def _unpacked(path: Path, name: str, stamp: tuple[int, int]) -> NDArray[Any]:
    """Return an array of an .npz whose header, directory and limits agree on its size."""
    with open_file(path) as stream, zipfile.ZipFile(stream) as archive:
        names = [member.filename.removesuffix(".npy") for member in archive.infolist()]
        if name not in names:
            raise VolumeError(f"image {path}#{name}: the file holds {', '.join(names[:8])}, not '{name}'")
        member = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
        shape, dtype = _checked_header(archive, member)
        if math.prod(shape) > MAX_VOXELS:
            raise VolumeError(f"array {path}#{name}: shape {shape} of {dtype} is no image or volume")
        with archive.open(member) as packed:
            array: NDArray[Any] = np.lib.format.read_array(packed, allow_pickle=False)
    array.flags.writeable = False  # others are given the same one
    return array


def _checked_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array, before memory is taken for it."""
    if member.file_size > MAX_ARRAY_BYTES:
        raise VolumeError(f"an array unpacks to {member.file_size} bytes; at most {MAX_ARRAY_BYTES} are read")
    with archive.open(member) as packed:
        version = np.lib.format.read_magic(packed)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(packed)
        if dtype.hasobject:
            raise ValueError("it holds objects, which would have to be unpickled")
        if math.prod(shape) * dtype.itemsize != member.file_size - packed.tell():
            raise VolumeError(f"an array is damaged: shape {list(shape)} of {dtype} is not what the file holds")
    return shape, dtype


def find_picture_arrays(path: Path) -> PictureArrays:
    """Return the pictures of an .npz, told by its arrays' headers alone.

    Pictures are whole numbers of 8 or 16 bits in an array [H, W], [H, W, 3], [N, H, W], [N, H, W, 1 or 3] or
    [N, 1 or 3, H, W], and no side is shorter than 8 px.

    Raises:
        VolumeError: An array of such a shape holds other numbers.
        OSError, PICTURE_ERRORS: It cannot be read.
    """
    keys: list[str] = []
    others = 0
    with open_file(path) as stream, zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            shape, dtype = _checked_header(archive, member)
            count = _pictures_of_shape(shape)
            if count is None:
                others += 1
                continue
            if dtype not in (np.uint8, np.uint16):
                raise VolumeError(f"values of an array are {dtype}; a picture has 8 or 16 bits of brightness")
            if count > MAX_PICTURES:
                raise VolumeError(f"an array of {count} pictures; at most {MAX_PICTURES} are read")
            name = member.filename.removesuffix(".npy")
            keys += [f"{name}#{number}" for number in range(count)] if count else [name]
    return PictureArrays(tuple(keys), others)


def _pictures_of_shape(shape: tuple[int, ...]) -> int | None:
    """Return how many pictures an array along its first axis holds, 0 where it is one picture, None where it holds none."""
    if len(shape) == 2 or (len(shape) == 3 and shape[-1] == 3):
        count, sides = 0, shape[:2]
    elif len(shape) == 3:
        count, sides = shape[0], shape[1:]
    elif len(shape) == 4 and shape[-1] in (1, 3):
        count, sides = shape[0], shape[1:3]
    elif len(shape) == 4 and shape[1] in (1, 3):
        count, sides = shape[0], shape[2:]
    else:
        return None
    return count if min(sides) >= _LEAST_SIDE_PX else None


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
