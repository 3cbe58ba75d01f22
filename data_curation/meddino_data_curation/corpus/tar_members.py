"""Tar members with nothing in their headers that could differ between two runs."""

import tarfile
from typing import IO

_BLOCK = 512
END_OF_ARCHIVE = b"\0" * (2 * _BLOCK)


def write_member(stream: IO[bytes], name: str, data: bytes) -> int:
    """Append one member.

    Args:
        stream: Where; its position must be a multiple of 512.
        name: At most 100 ASCII characters.
        data: Content.

    Returns:
        Offset of the content's first byte in the stream.
    """
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644  # times and owners are 0 and empty by default
    stream.write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
    offset = stream.tell()
    stream.write(data)
    stream.write(b"\0" * (-len(data) % _BLOCK))
    return offset
