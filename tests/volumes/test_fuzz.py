"""Damaged files of every format: an error of ours or a volume, never a crash, a hang or more memory than the header claims."""

import io
import multiprocessing
import os
import resource
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from meddino.core.errors import MedDINOError
from meddino.volumes.limits import ReadLimits
from meddino.volumes.read import read_volume
from tests.data_curation.conftest import make_hu
from tests.data_curation.dicom_files import ct_slice, enhanced_ct, write_series
from tests.volumes.test_archives import pack

HU = make_hu(0, (3, 24, 20))
LIMITS = ReadLimits(max_volume_voxels=4_000_000, max_axis_px=4096)
LONGEST_S = 10.0
MOST_BYTES = 128 << 20  # twice what the limits let a header promise, in 8 bytes a voxel
DAMAGED_FILES = int(os.environ.get("MEDDINO_FUZZ", "2000"))


def itk(name, tmp_path) -> bytes:
    image = sitk.GetImageFromArray(HU)
    image.SetSpacing((3.4, 3.5, 3.0))
    path = tmp_path / f"seed-{name}"
    sitk.WriteImage(image, str(path), useCompression="packed" in name)
    return path.read_bytes()


def dicom(item) -> bytes:
    stream = io.BytesIO()
    item.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def compressed(item, syntax, tmp_path) -> bytes:
    if syntax == RLELossless:
        item.compress(syntax, generate_instance_uid=False)
        return dicom(item)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(tmp_path / "seed.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG" if syntax == JPEGLosslessSV1 else "JPEG2000")
    writer.Execute(sitk.GetImageFromArray(HU[0]))
    frame = next(generate_frames(pydicom.dcmread(tmp_path / "seed.dcm").PixelData, number_of_frames=1))
    item.PixelRepresentation, item.RescaleIntercept = 1, 0
    item.file_meta.TransferSyntaxUID, item.PixelData = syntax, encapsulate([frame])
    item["PixelData"].VR = "OB"
    return dicom(item)


def seeds(tmp_path) -> dict[str, bytes]:
    found = {name: itk(name, tmp_path) for name in ("a.nii", "packed.nii.gz", "b.nrrd", "packed.nrrd", "c.mha", "packed.mha")}
    found["plain.dcm"] = dicom(ct_slice(HU[0], 0.0))
    found["frames.dcm"] = dicom(enhanced_ct(HU))
    deflated = ct_slice(HU[0], 0.0)
    deflated.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    found["deflated.dcm"] = dicom(deflated)
    for number, syntax in enumerate((RLELossless, JPEGLosslessSV1, JPEG2000Lossless)):
        found[f"compressed{number}.dcm"] = compressed(ct_slice(HU[0], 0.0), syntax, tmp_path)
    write_series(tmp_path / "series", HU)
    for ending in ("zip", "tar", "tgz"):
        found[f"archive.{ending}"] = pack(tmp_path / "series", tmp_path / f"seed.{ending}").read_bytes()
    return found


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, bytes changed, pieces doubled or taken out; half of them in the first 600 bytes, where headers are."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        end = len(changed) if rng.random() < 0.5 else min(600, len(changed))
        at, kind = int(rng.integers(0, max(end, 1))), rng.integers(0, 6)
        if kind <= 2 and changed:
            changed[min(at, len(changed) - 1)] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(0, 256))]))
        elif kind == 3:
            changed[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f"])
        elif kind == 4:
            del changed[at : at + int(rng.integers(1, 64))]
        else:
            changed[at:at] = changed[at : at + int(rng.integers(1, 64))]
    return bytes(changed[: int(rng.integers(0, len(changed) + 1))] if rng.random() < 0.15 else changed)


def read_damaged(path: Path, count: int) -> None:
    """Read a file, then so many damaged ones made from it."""
    data = path.read_bytes()
    read_volume(path, LIMITS)  # whole, it is read
    for number in range(count):
        rng = np.random.default_rng([number, zlib.crc32(path.name.encode())])
        path.write_bytes(mutated(data, rng))
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            volume = read_volume(path, LIMITS)
            assert volume.voxels.shape == volume.geometry.shape
        except MedDINOError as error:
            assert "\n" not in str(error), (path.name, number)
        except Exception as error:
            raise AssertionError((path.name, number)) from error
        assert time.monotonic() - started < LONGEST_S, (path.name, number)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_BYTES >> 10, (path.name, number)


def test_read_volume__of_damaged_files_ends_in_an_error_of_ours_or_a_volume(tmp_path, capfd):
    for name, data in seeds(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        read_damaged(tmp_path / name, 12)
    assert "gdcm" not in capfd.readouterr().err.lower()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_read_volume__of_2000_damaged_files_of_each_kind(tmp_path):
    """A process for each kind: a crash of a library, too, names its kind."""
    for name, data in seeds(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            child.submit(read_damaged, tmp_path / name, DAMAGED_FILES).result()
