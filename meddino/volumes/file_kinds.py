"""What a file is, by its name where that decides, else by its first bytes."""

import re
from pathlib import Path, PurePosixPath

from meddino.core.errors import VolumeError
from meddino.volumes.archives import open_file
from meddino.volumes.formats.nifti import first_bytes

HEAD_BYTES = 600
VOLUME_SUFFIXES = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "metaimage",
    ".mhd": "metaimage",
}
# Parts of volumes, and what lies beside them everywhere. Never opened.
_COMPANIONS = {
    ".raw", ".zraw", ".json", ".csv", ".tsv", ".txt", ".md", ".xml", ".pdf", ".html", ".xlsx", ".yaml", ".yml", ".log",
    ".md5", ".sha256", ".png", ".jpg", ".jpeg", ".gif", ".py", ".sh",
}  # fmt: skip
_COMPANION_NAMES = {"DICOMDIR", "LICENSE", "LICENCE", "README", "Thumbs.db", ".DS_Store"}
# Formats that CT comes in and that nothing here reads; a file of such a name that begins as DICOM does is read all the same.
_NOT_READ = {
    "Analyze or NIfTI in two files (.hdr, .img)": (".hdr", ".img", ".hdr.gz", ".img.gz"),
    "an archive, or packed": (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst", ".dcm.gz"),
    "NRRD or MetaImage packed as a whole": (".nrrd.gz", ".nhdr.gz", ".mha.gz", ".mhd.gz"),
    "a format of other tools": (
        ".npy", ".npz", ".h5", ".hdf5", ".mat", ".mnc", ".mgz", ".mgh", ".vtk", ".vti", ".tif", ".tiff", ".gipl", ".b2nd",
    ),
}  # fmt: skip
_FIRST_ELEMENT = re.compile(rb"(?:[\x02\x08]\x00..|\x00[\x02\x08]..)(?:[A-Z]{2}|..\x00\x00)", re.DOTALL)
_META_FIELD = re.compile(rb"\s*(?:ObjectType|NDims)\s*[=:]")


def volume_suffix(name: str) -> str | None:
    """Return the ending that makes a file a volume by its name, or None."""
    lower = name.lower()
    return next((suffix for suffix in sorted(VOLUME_SUFFIXES, key=len, reverse=True) if lower.endswith(suffix)), None)


def is_companion(name: str) -> bool:
    """Tell whether a file is known to be no volume by its name."""
    return name in _COMPANION_NAMES or name.startswith("._") or PurePosixPath(name.lower()).suffix in _COMPANIONS


def why_not_read(name: str) -> str:
    """Return which format a file has by its name, if it is one of CT that is not read; else ""."""
    lower = name.lower()
    return next((reason for reason, suffixes in _NOT_READ.items() if lower.endswith(suffixes)), "")


def read_head(path: Path) -> bytes:
    """Return a file's first bytes.

    Raises:
        OSError: It cannot be read.
        VolumeError: It lies in an archive that is damaged.
    """
    with open_file(path) as stream:
        try:
            return stream.read(HEAD_BYTES)
        except EOFError as error:
            raise VolumeError(str(error)) from error


def unpacked_head(path: Path, head: bytes) -> bytes | None:
    """Return the first bytes of what a gzip file holds, or None where it is none.

    Args:
        path: The file.
        head: Its own first bytes.

    Raises:
        OSError: It cannot be read.
        GZIP_ERRORS: What it holds is damaged.
    """
    if head[:2] != b"\x1f\x8b":
        return None
    return first_bytes(path, HEAD_BYTES)


def has_dicom_magic(head: bytes) -> bool:
    """Tell whether the 129th byte begins DICOM's "DICM"."""
    return head[128:132] == b"DICM"


def looks_like_dicom(head: bytes) -> bool:
    """Tell whether a file begins as DICOM does: with its mark, or, where that is missing, with a first element."""
    return has_dicom_magic(head) or _FIRST_ELEMENT.match(head) is not None


def volume_format(head: bytes) -> str | None:
    """Return "nifti" (in one file), "nrrd" or "metaimage" where the first bytes are those of such a file, else None."""
    if head[:4] in (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c") and head[344:347] == b"n+1":
        return "nifti"
    if head[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") and head[4:6] == b"n+":
        return "nifti"
    if head[:4] == b"NRRD":
        return "nrrd"
    return "metaimage" if _META_FIELD.match(head) else None
