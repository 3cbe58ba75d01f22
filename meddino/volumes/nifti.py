"""NIfTI's header and voxels, read here because ITK fills what a truncated file lacks without a word.

ITK (NiftiImageIO, 5.4) still says where the volume lies; what is read here is checked against the file's length and, in a .gz,
against its CRC.
"""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip
from isal.igzip_lib import IsalError
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.core.files import cause_without_path

_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_SAME_PLACE = 0.02  # of a voxel, over a whole axis of 100 voxels
_MAX_TAIL_BYTES = 1 << 16  # behind the last voxel; some writers pad
_MAX_OFFSET_BYTES = 64 << 20  # of the first voxel; between it and the header lie extensions
_BLOCK_BYTES = 8 << 20
_INT16 = np.iinfo(np.int16)
# What damaged gzip data raises. ISA-L's reader takes half the time of zlib's.
_ISAL_ERROR: type[Exception] = IsalError  # type: ignore[assignment]  # its stub calls the class an instance
GZIP_ERRORS = (EOFError, _ISAL_ERROR, gzip.BadGzipFile)


@dataclass(frozen=True)
class NiftiHeader:
    """What decides how the bytes become numbers.

    Attributes:
        dtype: NumPy type with the file's byte order.
        shape: [Z, Y, X].
        offset: Of the first voxel in the (uncompressed) file.
        slope: Multiplies; never 0.
        intercept: Is added.
        notes: What is unusual, in words of ours.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, int, int]
    offset: int
    slope: float
    intercept: float
    notes: tuple[str, ...]


def read_nifti_header(path: Path) -> NiftiHeader:
    """Read the header of a NIfTI-1 or NIfTI-2 file.

    Raises:
        VolumeError: It is damaged, or of a data type that holds no HU.
    """
    with opened(path) as stream:
        head = stream.read(600)
    order = "<" if head[:4] in (b"\x5c\x01\x00\x00", b"\x1c\x02\x00\x00") else ">"
    try:
        if struct.unpack_from(f"{order}i", head)[0] == 348:
            dims = struct.unpack_from(f"{order}8h", head, 40)
            (code,) = struct.unpack_from(f"{order}h", head, 70)
            offset, slope, intercept = struct.unpack_from(f"{order}3f", head, 108)
            affines = _affines_1(head, order)
            least = 352
        else:
            (code,) = struct.unpack_from(f"{order}h", head, 12)
            dims = struct.unpack_from(f"{order}8q", head, 16)
            offset, slope, intercept = struct.unpack_from(f"{order}q2d", head, 168)
            affines, least = None, 544
    except struct.error as error:
        raise VolumeError("NIfTI header is truncated") from error
    if code not in _TYPES:
        raise VolumeError(f"NIfTI data type {code} holds no HU; allowed: integers and real numbers of up to 64 bits")
    if not 0 <= offset <= _MAX_OFFSET_BYTES:
        raise VolumeError(f"NIfTI header says that voxels begin at byte {offset:g}")
    sizes = [max(int(size), 1) for size in dims[1:4]]
    if not np.isfinite([slope, intercept]).all() or slope == 0.0:
        slope, intercept = 1.0, 0.0  # the standard: a slope of 0 means that nothing is scaled
    shape = (sizes[2], sizes[1], sizes[0])
    return NiftiHeader(np.dtype(order + _TYPES[code]), shape, max(int(offset), least), slope, intercept, _affine_notes(affines))


def read_nifti_voxels(path: Path, header: NiftiHeader) -> NDArray[Any]:
    """Read the voxels, rescaled where the header says so.

    Raises:
        VolumeError: The file ends early or its checksum is wrong.
    """
    voxels = np.empty(int(np.prod(header.shape)), dtype=_read_as(header))
    try:
        with opened(path) as stream:
            stream.seek(header.offset)
            _read_blocks(stream, header, voxels)
            # To the end, where gzip compares its checksum: but no further than any honest file goes.
            if len(stream.read(_MAX_TAIL_BYTES + 1)) > _MAX_TAIL_BYTES:
                raise VolumeError("the file goes on behind the last voxel that its header promises")
    except GZIP_ERRORS as error:
        raise VolumeError("voxels cannot be read: gzip data is truncated or damaged") from error
    except OSError as error:
        raise VolumeError(f"voxels cannot be read: {cause_without_path(error)}") from error
    return voxels.reshape(header.shape)


def opened(path: Path) -> IO[bytes]:
    """Open a file, unpacked if it is packed with gzip."""
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    unpacked: IO[bytes] = igzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[no-untyped-call]
    return unpacked


def _read_as(header: NiftiHeader) -> np.dtype[Any]:
    if header.slope == 1.0:
        if header.intercept == 0.0:
            return header.dtype.newbyteorder("=")
        if header.intercept == int(header.intercept) and header.dtype.kind in "iu":
            # Two bytes stay two bytes: what leaves the range of int16 is no HU and is clipped at the end anyhow.
            return np.dtype(np.int16 if header.dtype.itemsize <= 2 else np.int32)
    return np.dtype(np.float32)


def _read_blocks(stream: IO[bytes], header: NiftiHeader, voxels: NDArray[Any]) -> None:
    """Fill the voxels block by block, rescaled on the way: no second copy of the volume is ever held."""
    as_stored = voxels.dtype == header.dtype and header.slope == 1.0 and header.intercept == 0.0
    per_block = _BLOCK_BYTES // header.dtype.itemsize
    space = np.empty(0 if as_stored else min(per_block, voxels.size), dtype=header.dtype)
    for start in range(0, voxels.size, per_block):
        target = voxels[start : start + per_block]
        block = target if as_stored else space[: len(target)]
        done = _fill(stream, block.view(np.uint8).data)
        if done < block.nbytes:
            done += start * header.dtype.itemsize
            total = voxels.size * header.dtype.itemsize
            raise VolumeError(f"voxels cannot be read: the file is truncated ({done} of {total} bytes)")
        if as_stored:
            continue
        if voxels.dtype == np.int16:
            target[:] = np.clip(block.astype(np.int32) + int(header.intercept), _INT16.min, _INT16.max)
            continue
        target[:] = block
        if header.slope != 1.0:
            target *= voxels.dtype.type(header.slope)
        if header.intercept != 0.0:
            target += voxels.dtype.type(header.intercept)


def _fill(stream: IO[bytes], view: memoryview) -> int:
    done = 0
    while done < len(view) and (got := stream.readinto(view[done:])):  # type: ignore[attr-defined]
        done += got
    return done


def _affines_1(head: bytes, order: str) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Return qform's and sform's 3 x 3 parts, each None where its code is 0."""
    qform_code, sform_code = struct.unpack_from(f"{order}2h", head, 252)
    sform = np.array(struct.unpack_from(f"{order}12f", head, 280), dtype=np.float64).reshape(3, 4)[:, :3]
    b, c, d = struct.unpack_from(f"{order}3f", head, 256)
    spacing = np.array(struct.unpack_from(f"{order}4f", head, 76), dtype=np.float64)
    a = np.sqrt(max(0.0, 1.0 - b * b - c * c - d * d))
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    qform = turn * (spacing[1:] * np.array([1.0, 1.0, -1.0 if spacing[0] < 0 else 1.0]))
    return (qform if qform_code > 0 else None), (sform if sform_code > 0 else None)


def _affine_notes(affines: tuple[NDArray[np.float64] | None, NDArray[np.float64] | None] | None) -> tuple[str, ...]:
    if affines is None:
        return ()
    qform, sform = affines
    notes: tuple[str, ...] = ()
    if qform is not None and sform is not None:
        scale = max(float(np.abs(sform).max()), 1e-6)
        if np.abs(qform - sform).max() > _SAME_PLACE * scale:
            notes += ("sform and qform disagree",)
    if sform is not None:
        lengths = np.linalg.norm(sform, axis=0)
        if lengths.min() > 0:
            cosines = (sform / lengths).T @ (sform / lengths) - np.eye(3)
            if np.abs(cosines).max() > _SAME_PLACE:
                notes += (f"axes are {np.degrees(np.arcsin(min(1.0, np.abs(cosines).max()))):.1f} degrees off a right angle",)
    return notes
