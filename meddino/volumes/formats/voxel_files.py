"""Where the voxels of an NRRD or MetaImage file lie, as its header says: behind it, or in files of their own."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from isal import isal_zlib

from meddino.core.errors import VolumeError
from meddino.core.files import cause_without_path
from meddino.volumes.archives import archive_of, file_size, open_file
from meddino.volumes.formats.nifti import GZIP_ERRORS
from meddino.volumes.formats.tail import check_tail, most_tail_bytes

_HEADER_BYTES = 1 << 20  # no honest header is longer; a list of 10,000 files fits
_MAX_FILES = 100_000
_PACKED_BLOCK_BYTES = 1 << 14  # unpacks to 16 MiB at most
_GZIP_OR_ZLIB = 47  # zlib's wbits: the data themselves say which
_NUMBERED = re.compile(r"([^%]*%0?\d{0,2}d[^%\s]*)\s+(-?\d{1,9})\s+(-?\d{1,9})\s+(-?\d{1,9})(?:\s+\d+)?", re.ASCII)
# How many bytes of voxels a byte of the file can stand for, at most.
_MOST_PER_BYTE = {"raw": 1, "text": 8, "deflate": 1032, "unknown": 1032}
# teem, which reads NRRD for ITK, takes these keys without their space, too.
_NRRD_KEYS = {key.replace(" ", ""): key for key in ("data file", "space directions", "space units", "byte skip", "line skip")}
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
        header_bytes: Length of the header where voxels follow it, else 0.
    """

    files: tuple[Path, ...]
    encoding: str
    fields: dict[str, str] = field(default_factory=dict)
    header_bytes: int = 0

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

    def check_length(self, header: Path, promised: int, longest_axis_px: int) -> None:
        """Refuse files that hold other than the voxels that the header promises: ITK would cut or shear them, or invent some.

        Text is not measured, nor voxels that are counted from the end of their file.

        Args:
            header: The file itself.
            promised: Bytes of voxels.
            longest_axis_px: Voxels along it.

        Raises:
            VolumeError: They do, are damaged, or one cannot be read.
        """
        if self.encoding not in ("raw", "deflate") or min(map(self._count, ("line skip", "byte skip", "headersize"))) < 0:
            return
        most = most_tail_bytes(promised, longest_axis_px)
        try:
            held = sum(self._held_bytes(path, promised + most) for path in self.files or (header,))
        except OSError as error:
            raise VolumeError(f"the file of its voxels cannot be read: {cause_without_path(error)}") from error
        if held < promised:
            raise VolumeError("voxels cannot be read: file is truncated or damaged")
        check_tail(held - promised, most)

    def _held_bytes(self, path: Path, most: int) -> int:
        """Return how many bytes of voxels a file holds, counted not much further than `most` where they are packed."""
        skipped = self._count("byte skip")
        with open_file(path) as stream:
            # MetaImage's counts from the beginning of the file, NRRD's from the header's end.
            stream.seek(self._count("headersize") or self.header_bytes)
            for _ in range(self._count("line skip")):
                if not stream.readline(_HEADER_BYTES):
                    break
            if self.encoding == "raw":
                return file_size(path) - stream.tell() - skipped
            packed = self._count("compresseddatasize") or file_size(path)
            return _unpacked_bytes(stream, packed, most + skipped) - skipped  # NRRD skips bytes of what is unpacked

    def _count(self, name: str) -> int:
        """Return a field's whole number, 0 where there is none, -1 where it counts from the end or is not understood."""
        written = self.fields.get(name, "0")
        return int(written) if re.fullmatch(r"\d{1,18}", written, re.ASCII) else -1

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
        written = stream.read(_HEADER_BYTES).splitlines(keepends=True)
    lines = [line.decode("utf-8", "surrogateescape").rstrip("\r\n") for line in written]
    fields: dict[str, str] = {}
    named, encoding, count = (_metaimage if format == "metaimage" else _nrrd)(lines, fields)
    if named and archive_of(path) is not None:
        raise VolumeError("its voxels lie in files of their own, which are not looked for in an archive; unpack it")
    header_bytes = 0 if named else sum(map(len, written[:count]))
    return VoxelFiles(tuple(_inside(path.parent, name) for name in named), encoding, fields, header_bytes)


def _metaimage(lines: list[str], fields: dict[str, str]) -> tuple[list[str], str, int]:
    """Fill in the fields; return the files of voxels, their encoding, and how many lines the header has."""
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
                if encoding == "deflate" and fields.get("compresseddatasize", "0") == "0":  # ITK would unpack the header
                    raise VolumeError(
                        "MetaImage header does not say how many bytes its packed voxels take (CompressedDataSize)"
                    )
                return [], encoding, number + 1
            return _names(value, lines[number + 1 :]), encoding, number + 1
    raise VolumeError("MetaImage header names no place of its voxels")


def _nrrd(lines: list[str], fields: dict[str, str]) -> tuple[list[str], str, int]:
    """As `_metaimage`."""
    names: list[str] = []
    encoding = "unknown"
    count = len(lines)
    for number, line in enumerate(lines):
        if not line:  # the end of the header; voxels follow
            count = number + 1
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
    return names, encoding, count


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


def _unpacked_bytes(stream: IO[bytes], packed: int, most: int) -> int:
    """Count what gzip or zlib data unpack to, in little memory: up to where they are damaged, and not much beyond `most`.

    Args:
        stream: Stands at their beginning.
        packed: Bytes that may be read of it.
        most: Bytes.
    """
    count, end = 0, stream.tell() + packed
    unpacker = isal_zlib.decompressobj(wbits=_GZIP_OR_ZLIB)
    try:
        while count <= most and (data := unpacker.unused_data or stream.read(min(_PACKED_BLOCK_BYTES, end - stream.tell()))):
            if unpacker.eof:
                unpacker = isal_zlib.decompressobj(wbits=_GZIP_OR_ZLIB)  # gzip data may follow each other
            count += len(unpacker.decompress(data))
    except GZIP_ERRORS:
        return count
    return count


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
