"""How much memory one worker takes for one volume. Run as `python -m tests.data_curation.peak_memory VOLUME [key=value]`.

Prints the largest resident size beyond what the process held before the volume, in bytes. A small volume is curated
first, so that libraries and their buffers are in place.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from meddino_data_curation.cli import main
from pydicom.uid import RLELossless

from tests.data_curation.conftest import SALT, make_hu, write_volume
from tests.data_curation.dicom_files import enhanced_ct, write_enhanced, write_series


def status_bytes(name: str) -> int:
    """Return a figure of /proc/self/status, e.g. VmRSS (now) or VmHWM (most since it was last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def peak_bytes(volume: Path, folder: Path, *overrides: str) -> int:
    """Curate one volume in this process and return what it took at most."""
    (folder / "salt").write_text(SALT)
    small = write_volume(folder / "small.nii.gz", make_hu(3))
    more = ["workers=1", f"privacy.salt_file={folder / 'salt'}", *overrides]
    if main(["build", str(small), "--out", str(folder / "first"), *more]) != 0:
        raise RuntimeError("the small volume could not be curated")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = status_bytes("VmRSS")
    if main(["build", str(volume), "--out", str(folder / "second"), *more]) != 0:
        raise RuntimeError("the volume could not be curated")
    return status_bytes("VmHWM") - before


def write_tall(folder: Path, kind: str, slices: int, side_px: int = 512) -> Path:
    """Write a CT of 16 repeated slices with noise; what comes back is a file or a folder."""
    folder.mkdir(parents=True)
    block = make_hu(1, (16, side_px, side_px))
    hu = np.empty((slices, side_px, side_px), np.int16)
    for start in range(0, slices, 16):
        hu[start : start + 16] = block[: slices - start] + np.int16(start // 16 % 7)
    if kind == "dicom":
        write_series(folder, hu, [f"{z:05d}" for z in range(slices)], PixelSpacing=[0.8, 0.8])
        return folder
    if kind == "enhanced":
        write_enhanced(folder / "enhanced", hu)
        return folder
    if kind == "packed":
        item = enhanced_ct(hu)
        item.compress(RLELossless)
        item.save_as(folder / "packed", enforce_file_format=True)
        return folder
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((0.8, 0.8, 1.0))
    if kind == "oblique":  # turned by 40 degrees about x
        cosine, sine = np.cos(np.radians(40)), np.sin(np.radians(40))
        image.SetDirection([1, 0, 0, 0, cosine, -sine, 0, sine, cosine])
    path = folder / {"scaled": "a.nii", "sagittal": "a.nii.gz", "oblique": "a.nii"}.get(kind, f"a.{kind}")
    if kind == "sagittal":
        image = sitk.DICOMOrient(image, "PIR")
    sitk.WriteImage(image, str(path), useCompression=path.suffix != ".nii", compressionLevel=1)
    if kind == "scaled":
        with path.open("r+b") as stream:
            stream.seek(112)
            stream.write(np.array([1.0, 3.0], "<f4").tobytes())
    return path


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(peak_bytes(Path(sys.argv[1]), Path(name), *sys.argv[2:]))  # noqa: T201
