"""Where the voxels of an NRRD or MetaImage file lie, as its header says: behind it, or in files of their own."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from meddino.core.errors import VolumeError
from meddino.core.files import cause_without_path
from meddino.volumes.archives import archive_of, file_size, open_file

_HEADER_BYTES = 1 << 20  # no honest header is longer; a list of 10,000 files fits
_MAX_FILES = 100_000
_NUMBERED = re.compile(r"([^%]*%0?\d{0,2}d[^%\s]*)\s+(-?\d{1,9})\s+(-?\d{1,9})\s+(-?\d{1,9})(?:\s+\d+)?", re.ASCII)
# How many bytes of voxels a byte of the file can stand for, at most.
_MOST_PER_BYTE = {"raw": 1, "text": 8, "deflate": 1032, "unknown": 1032}
# teem, which reads NRRD for ITK, takes these keys without their space, too.
_NRRD_KEYS = {key.replace(" ", ""): key for key in ("data file", "space directions", "space units")}
_NRRD_ENCODINGS = {
    "raw": "raw", "txt": "text", "text": "text", "ascii": "text", "hex": "text", "gz": "deflate", "gzip": "deflate",
}  # fmt: skip


@dataclass(frozen=True)
class VoxelFiles:
    """What a header says of its voxels.

    Attributes:
        files: Where they lie; empty if behind the header.
        encoding: "raw", "text", "deflate" or "unknown".
        fields: The header's own words by key in small letters.
    """

    files: tuple[Path, ...]
    encoding: str
    fields: dict[str, str] = field(default_factory=dict)

    def check_promise(self, header: Path, promised: int) -> None:
        """Refuse a header that promises more than its files can hold, before memory is taken for it.

        Args:
            header: The file itself.
            promised: Bytes of voxels.

        Raises:
            VolumeError: They cannot, or a file is missing.
        """
        size = sum(_size(path) for path in self.files) if self.files else file_size(header)
        packed = self.fields.get("compresseddatasize", "")
        # MetaImage's: ITK takes memory for it unasked. What is no number is not told: it may be a name.
        if packed and not re.fullmatch(r"\d{1,18}", packed, re.ASCII):
            raise VolumeError(f"header says no number of bytes that voxels are packed into; at most {size} are in files")
        if packed and int(packed) > size:
            raise VolumeError(f"header says that voxels are packed into {packed} bytes, in files of {size}")
        if promised > size * _MOST_PER_BYTE[self.encoding]:
            where = f"{len(self.files)} files of voxels with {size} bytes" if self.files else f"a file of {size} bytes"
            raise VolumeError(f"header promises {promised} bytes, which {where} cannot hold")

    @property
    def modified(self) -> str:
        """Differs when a file of voxels has changed."""
        return "".join(f":{_modified(path)}" for path in self.files)


def find_voxel_files(path: Path, format: str) -> VoxelFiles:
    """Read where a header says that its voxels lie.

    Args:
        path: An NRRD or MetaImage file, with or without voxels in it.
        format: "nrrd" or "metaimage".

    Raises:
        VolumeError: It names files outside its own folder, or in a way that is not understood. The message names none.
        OSError: It cannot be read.
    """
    with open_file(path) as stream:
        lines = re.split(r"\r\n|\n|\r", stream.read(_HEADER_BYTES).decode("utf-8", "surrogateescape"))
    fields: dict[str, str] = {}
    named, encoding = (_metaimage if format == "metaimage" else _nrrd)(lines, fields)
    if named and archive_of(path) is not None:
        raise VolumeError("its voxels lie in files of their own, which are not looked for in an archive; unpack it")
    return VoxelFiles(tuple(_inside(path.parent, name) for name in named), encoding, fields)


def _metaimage(lines: list[str], fields: dict[str, str]) -> tuple[list[str], str]:
    encoding = "raw"
    for number, line in enumerate(lines):
        key, _, value = (part.strip() for part in re.sub("[=:]", "\n", line, count=1).partition("\n"))
        fields[key.lower()] = value
        if key == "CompressedData" and value.lower() in ("true", "1"):
            encoding = "deflate"
        if key == "BinaryData" and value.lower() in ("false", "0"):
            encoding = "text"
        if key == "NDims" and not re.fullmatch(r"\d{1,2}", value, re.ASCII):  # ITK counts for minutes where it is negative
            raise VolumeError("MetaImage header's number of axes is no whole number from 0 to 99")
        if key == "ElementDataFile":  # by the format's rule the last line of a header; ITK wants these very letters
            if value.upper() == "LOCAL":
                return [], encoding
            return _names(value, lines[number + 1 :]), encoding
    raise VolumeError("MetaImage header names no place of its voxels")


def _nrrd(lines: list[str], fields: dict[str, str]) -> tuple[list[str], str]:
    names: list[str] = []
    encoding = "unknown"
    for number, line in enumerate(lines):
        if not line:  # the end of the header; voxels follow
            break
        key, _, value = (part.strip() for part in line.partition(":"))
        if key.startswith("#") or value.startswith("="):
            continue
        key = _NRRD_KEYS.get(key.lower(), key.lower())
        fields[key] = value
        if key == "encoding":
            encoding = _NRRD_ENCODINGS.get(value.lower(), "unknown")
        if key == "data file":
            names += _names(value, lines[number + 1 :])
            if value.upper().startswith("LIST"):
                break  # by the format's rule the last field
    return names, encoding


def _names(value: str, below: list[str]) -> list[str]:
    """Return the names that stand for "file", "LIST" with a name a line, or "name%03d first last step"."""
    if re.fullmatch(r"LIST(\s+\d+)?", value, re.IGNORECASE):
        return [line.strip() for line in below if line.strip()][:_MAX_FILES]
    if "%" not in value:
        return [value]
    numbered = _NUMBERED.fullmatch(value)
    if numbered is None:
        raise VolumeError("header names the files of its voxels by a pattern that is not understood")
    first, last, step = (int(text) for text in numbered.groups()[1:])
    if step == 0 or abs(last - first) // abs(step) >= _MAX_FILES:
        raise VolumeError("header names the files of its voxels by a pattern without an end")
    return [numbered[1] % index for index in range(first, last + (1 if step > 0 else -1), step)]


def _inside(folder: Path, name: str) -> Path:
    # By its words, not by where links lead: links are the owner's, the words are whoever's who wrote the file.
    plain = os.path.normpath(name.replace("\\", "/"))
    if PurePosixPath(plain).is_absolute() or plain == ".." or plain.startswith("../") or plain[1:2] == ":":
        raise VolumeError("header names a file of voxels outside its own folder")
    return folder / plain


def _size(path: Path) -> int:
    try:
        if path.is_file():
            return path.stat().st_size
    except OSError as error:
        raise VolumeError(f"the file of its voxels cannot be read: {cause_without_path(error)}") from error
    raise VolumeError("the file of its voxels is missing")


def _modified(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size}:{status.st_mtime_ns}"
