"""NIfTI's header, grid and voxels, read here: ITK fills what a truncated file lacks and says nothing of what it assumes.

What is read is checked against the file's length and, in a .gz, against its CRC.
"""

import gzip
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip
from isal.igzip_lib import IsalError
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.core.files import cause_without_path
from meddino.volumes.archives import open_file
from meddino.volumes.formats.axes import SAME_PLACE, SAME_SPACING, right_angled
from meddino.volumes.formats.intercept import add_whole, is_whole
from meddino.volumes.formats.tail import MAX_TAIL_BYTES, check_tail, most_tail_bytes
from meddino.volumes.geometry import Geometry
from meddino.volumes.limits import ReadLimits

_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_MAX_OFFSET_BYTES = 64 << 20  # of the first voxel; between it and the header lie extensions
_BLOCK_BYTES = 8 << 20
# What damaged gzip data raises. ISA-L's reader takes half the time of zlib's.
_ISAL_ERROR: type[Exception] = IsalError  # type: ignore[assignment]  # its stub calls the class an instance
GZIP_ERRORS = (EOFError, _ISAL_ERROR, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class NiftiHeader:
    """What decides how the bytes become numbers at places.

    Attributes:
        dtype: NumPy type with the file's byte order.
        geometry: The grid.
        offset: Of the first voxel in the (uncompressed) file.
        slope: Multiplies; never 0.
        intercept: Is added.
        notes: What is unusual or assumed, in words of ours.
        irregular: Why the grid is not quite that of the voxels, or "".
    """

    dtype: np.dtype[Any]
    geometry: Geometry
    offset: int
    slope: float
    intercept: float
    notes: tuple[str, ...]
    irregular: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[Z, Y, X]."""
        return self.geometry.shape

    @property
    def stays_whole(self) -> bool:
        """True if voxels are stored as integers and are integers once rescaled."""
        return self.dtype.kind in "iu" and self.slope == 1.0 and is_whole(self.intercept)

    @property
    def is_scaled(self) -> bool:
        """True if rescaling changes values and makes real numbers of them."""
        return (self.slope, self.intercept) != (1.0, 0.0) and not self.stays_whole


@dataclass(frozen=True)
class _Fields:
    """The header's own numbers."""

    dims: tuple[int, ...]
    code: int
    offset: float
    slope: float
    intercept: float
    pixdim: NDArray[np.float64]
    quaternion: tuple[float, ...]
    qoffset: tuple[float, ...]
    sform: NDArray[np.float64]
    codes: tuple[int, int]
    units: int
    least_offset: int
    order: str


def read_nifti_header(path: Path, limits: ReadLimits) -> NiftiHeader:
    """Read the header of a NIfTI-1 or NIfTI-2 file.

    Raises:
        VolumeError: It is damaged, of a data type that holds no numbers, or promises more than may be read.
    """
    try:
        fields = _fields(first_bytes(path, 600))
    except struct.error as error:
        raise VolumeError("NIfTI header is truncated") from error
    except GZIP_ERRORS as error:
        raise VolumeError("gzip data is truncated or damaged") from error
    if fields.code not in _TYPES:
        raise VolumeError(f"NIfTI data type {fields.code} holds no HU; allowed: integers and real numbers of up to 64 bits")
    if not 0 <= fields.offset <= _MAX_OFFSET_BYTES:
        raise VolumeError(f"NIfTI header says that voxels begin at byte {fields.offset:g}")
    if not 1 <= fields.dims[0] <= 7:
        raise VolumeError(f"NIfTI header is damaged: it says {fields.dims[0]} axes")
    limits.check(fields.dims[1 : fields.dims[0] + 1])
    slope, intercept = fields.slope, fields.intercept
    if not np.isfinite([slope, intercept]).all() or slope == 0.0:
        slope, intercept = 1.0, 0.0  # the standard: a slope of 0 means that nothing is scaled
    geometry, notes, irregular = _grid(fields)
    dtype = np.dtype(fields.order + _TYPES[fields.code])
    return NiftiHeader(dtype, geometry, max(int(fields.offset), fields.least_offset), slope, intercept, notes, irregular)


def _fields(head: bytes) -> _Fields:
    order = "<" if head[:4] in (b"\x5c\x01\x00\x00", b"\x1c\x02\x00\x00") else ">"
    if struct.unpack_from(f"{order}i", head)[0] == 348:
        form, real, at = "h", "f", {"dim": 40, "code": 70, "pixdim": 76, "codes": 252, "quatern": 256, "srow": 280}
        offset, slope, intercept = struct.unpack_from(f"{order}3f", head, 108)
        units, least, codes = head[123], 352, struct.unpack_from(f"{order}2h", head, 252)
    else:
        form, real, at = "q", "d", {"dim": 16, "code": 12, "pixdim": 104, "codes": 344, "quatern": 352, "srow": 400}
        offset, slope, intercept = struct.unpack_from(f"{order}q2d", head, 168)
        codes, units = struct.unpack_from(f"{order}2i", head, 344), struct.unpack_from(f"{order}i", head, 500)[0]
        least = 544
    rigid = struct.unpack_from(f"{order}6{real}", head, at["quatern"])
    return _Fields(
        dims=struct.unpack_from(f"{order}8{form}", head, at["dim"]),
        code=struct.unpack_from(f"{order}h", head, at["code"])[0],
        offset=offset,
        slope=slope,
        intercept=intercept,
        pixdim=np.array(struct.unpack_from(f"{order}4{real}", head, at["pixdim"]), dtype=np.float64),
        quaternion=rigid[:3],
        qoffset=rigid[3:],
        sform=np.array(struct.unpack_from(f"{order}12{real}", head, at["srow"]), dtype=np.float64).reshape(3, 4),
        codes=codes,
        units=units & 7,
        least_offset=least,
        order=order,
    )


def _grid(fields: _Fields) -> tuple[Geometry, tuple[str, ...], str]:
    """Return the grid, what was assumed, and why it is not quite the voxels' own.

    The sform counts where there is one, as the standard advises and nibabel has it, else the qform.
    """
    notes: list[str] = []
    with np.errstate(all="ignore"):
        qform, sform = _qform(fields), fields.sform
    has_q, has_s = (code > 0 for code in fields.codes)
    sizes = np.abs(fields.pixdim[1:])
    if has_s and (not np.isfinite(sform).all() or np.linalg.matrix_rank(sform[:, :3]) < 3):
        has_s = False
        notes.append("sform is no matrix of space: not used")
    if has_s:
        matrix = sform
        if has_q and np.abs(qform - sform).max() > SAME_PLACE * np.abs(sform[:, :3]).max():
            notes.append("sform and qform disagree")
    elif has_q:
        matrix = qform
    else:
        matrix = np.column_stack([np.diag(sizes * (-1, -1, 1)), np.zeros(3)])
        notes.append("orientation is not in the file: axes taken to run to left, back and up")
    if has_q and not has_s and (fields.pixdim[1:] < 0).any():
        notes.append("voxel size is negative in the file: its sign is not used")
    if fields.units == 0:
        notes.append("units are not in the file: taken as mm")
    elif fields.units not in _UNIT_MM:
        raise VolumeError(f"NIfTI header says units of space {fields.units}; known are 1 (m), 2 (mm), 3 (um)")
    scale = _UNIT_MM[fields.units]
    lengths = np.linalg.norm(matrix[:, :3], axis=0)
    # Where they agree, pixdim has the value without the matrix's rounding.
    if has_s and np.abs(lengths - sizes).max() > SAME_SPACING * lengths.max():
        notes.append("voxel size and sform disagree: the sform's is taken")
        sizes = lengths
    if not np.isfinite(matrix).all() or not np.isfinite(sizes).all() or sizes.min() <= 0:
        raise VolumeError(f"voxel spacing {[round(float(size), 4) for size in sizes]} mm; must be above 0")
    axes, sheared = right_angled(matrix[:, :3] / lengths)
    if sheared:
        notes.append(sheared)
    dims = [int(size) for size in (*fields.dims[1 : fields.dims[0] + 1], 1, 1)[:3]]
    to_lps = np.array([-1.0, -1.0, 1.0])
    origin = matrix[:, 3] * to_lps * scale
    geometry = Geometry(
        shape=(dims[2], dims[1], dims[0]),
        spacing_mm=(float(sizes[2] * scale), float(sizes[1] * scale), float(sizes[0] * scale)),
        origin_mm=(float(origin[0]), float(origin[1]), float(origin[2])),
        axes=(axes * to_lps[:, None]).T[::-1].copy(),
    )
    return geometry, tuple(notes), sheared


def read_nifti_voxels(path: Path, header: NiftiHeader) -> NDArray[Any]:
    """Read the voxels, rescaled where the header says so.

    Returns:
        [Z, Y, X] as stored; rescaled ones as integers where `stays_whole` (`add_whole` chooses the type), else as float32.

    Raises:
        VolumeError: The file ends early, goes on behind its voxels, or its checksum is wrong.
        MemoryError: There is not enough memory for it.
    """
    dtype = np.dtype(np.float32) if header.is_scaled else header.dtype.newbyteorder("=")
    voxels = np.empty(int(np.prod(header.shape)), dtype=dtype)
    try:
        with _opened(path) as stream:
            stream.seek(header.offset)
            _read_blocks(stream, header, voxels)
            # To the end, where gzip compares its checksum: but no further than any honest file goes.
            most = most_tail_bytes(voxels.size * header.dtype.itemsize, max(header.shape))
            check_tail(len(stream.read(MAX_TAIL_BYTES + 1)), most)
    except GZIP_ERRORS as error:
        raise VolumeError("voxels cannot be read: gzip data is truncated or damaged") from error
    except OSError as error:
        raise VolumeError(f"voxels cannot be read: {cause_without_path(error)}") from error
    if header.stays_whole and header.intercept:
        voxels = add_whole(voxels, int(header.intercept))
    return voxels.reshape(header.shape)


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of a file, unpacked if it is packed with gzip, whatever becomes of those behind them."""
    # ISA-L's reader keeps back what comes before the end of a small file that is cut off.
    with open_file(path) as stream, gzip.open(stream) if _is_packed(path) else stream as unpacked:
        return unpacked.read(count)


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file, unpacked if it is packed with gzip."""
    with open_file(path) as stream:
        yield igzip.open(stream, "rb") if _is_packed(path) else stream  # type: ignore[no-untyped-call,misc]


def _is_packed(path: Path) -> bool:
    with open_file(path) as stream:
        return stream.read(2) == b"\x1f\x8b"


def _read_blocks(stream: BufferedIOBase, header: NiftiHeader, voxels: NDArray[Any]) -> None:
    """Fill the voxels block by block, real numbers rescaled on the way: no second copy of the volume is ever held."""
    as_stored = voxels.dtype == header.dtype and not header.is_scaled
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
        target[:] = block
        if header.is_scaled:
            target *= voxels.dtype.type(header.slope)
            target += voxels.dtype.type(header.intercept)


def _fill(stream: BufferedIOBase, view: memoryview) -> int:
    done = 0
    while done < len(view) and (got := stream.readinto(view[done:])):
        done += got
    return done


def _qform(fields: _Fields) -> NDArray[np.float64]:
    b, c, d = fields.quaternion
    a = np.sqrt(max(0.0, 1.0 - b * b - c * c - d * d))
    b, c, d = (value / max(1.0, np.sqrt(b * b + c * c + d * d)) for value in (b, c, d))
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    sizes = np.abs(fields.pixdim[1:]) * np.array([1.0, 1.0, -1.0 if fields.pixdim[0] < 0 else 1.0])
    return np.column_stack([turn * sizes, fields.qoffset])
