"""The same voxels at the same places as readers that we did not write: nibabel, pydicom, GDCM in ITK, dcm2niix, plastimatch.

Where they disagree, and why ours is what it is: docs/curation.md, "Other readers".
"""

import shutil
import subprocess

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from meddino.core.errors import VolumeError
from meddino.volumes.geometry import Geometry, geometry_from_xyz
from meddino.volumes.orientation import turn_to_lps
from meddino.volumes.read import find_series, read_volume
from tests.data_curation.conftest import make_hu
from tests.data_curation.dicom_files import enhanced_ct, write_series
from tests.volumes.test_files import CODES, grid, nifti

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
PLACE_MM = 0.01


def affine_of(geometry: Geometry) -> np.ndarray:
    """[4, 4], from x y z voxel numbers to LPS millimetres."""
    affine = np.eye(4)
    affine[:3, :3] = (geometry.axes * np.asarray(geometry.spacing_mm)[:, None])[::-1].T
    affine[:3, 3] = geometry.origin_mm
    return affine


def assert_like_nibabel(path) -> None:
    image = nibabel.load(path)
    volume = read_volume(path)
    theirs = np.asarray(image.dataobj).reshape(volume.voxels.shape[::-1], order="F").T
    np.testing.assert_allclose(volume.voxels, theirs, rtol=1e-6, atol=1e-4)
    unit = {"micron": 0.001, "meter": 1000.0}.get(image.header.get_xyzt_units()[0], 1.0)
    affine = RAS_TO_LPS @ image.affine
    affine[:3] *= unit
    ends = np.array(np.meshgrid(*[(0, size - 1) for size in volume.voxels.shape[::-1]])).reshape(3, -1)
    ends = np.vstack([ends, np.ones(8)])
    assert np.abs((affine_of(volume.geometry) - affine) @ ends)[:3].max() < PLACE_MM


@pytest.mark.parametrize("seed", range(30))
def test_generated_nifti__is_what_nibabel_reads(tmp_path, seed):
    rng = np.random.default_rng(seed)
    voxels = rng.integers(0, 100, rng.integers(2, 7, 3)).astype(sorted(CODES)[seed % len(CODES)])
    form, scale = ("sform", "qform")[seed % 2], [(0.0, 0.0), (1.0, -1024.0), (2.0, 0.5)][seed % 3]
    affine = grid(seed)
    (tmp_path / "a.nii").write_bytes(nifti(voxels, affine, form, 2, *scale, 1 + seed % 2, seed % 4))
    assert_like_nibabel(tmp_path / "a.nii")


@pytest.mark.slow
def test_real_nifti__is_what_nibabel_reads(shared_data):
    files = [path for path in sorted(shared_data.rglob("*.nii*")) if path.name.endswith((".nii", ".nii.gz"))]
    assert files
    for path in files:
        assert_like_nibabel(path)


def assert_like_pydicom(folder) -> int:
    count = 0
    for found in find_series(folder):
        if found.problem:
            continue
        volume = found.read()
        for z, file in enumerate(found.files_of_slices()):
            item = pydicom.dcmread(file)
            if "PixelSpacing" not in item or int(item.get("NumberOfFrames", 1)) > 1:
                continue
            stored = item.pixel_array.astype(np.float64)
            hu = np.clip(stored * float(item.get("RescaleSlope", 1)) + float(item.get("RescaleIntercept", 0)), -32768, 32767)
            real = stored != item.get("PixelPaddingValue", np.inf)
            assert np.abs(volume.voxels[z] - hu)[real].max() <= 0.5, file
            place = (affine_of(volume.geometry) @ [0, 0, z, 1])[:3]
            if not volume.irregular:
                assert np.abs(place - np.array(item.ImagePositionPatient, float)).max() < 0.05, file
            count += 1
    return count


@pytest.mark.slow
def test_real_dicom__is_what_pydicom_reads(shared_data):
    assert assert_like_pydicom(shared_data / "ct" / "lungdx_dicom") == 8


def assert_like_itk(volume, image) -> None:
    theirs = geometry_from_xyz(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    ours, other = turn_to_lps(volume.geometry), turn_to_lps(theirs)
    np.testing.assert_allclose(ours.apply(volume.voxels), other.apply(sitk.GetArrayFromImage(image)), atol=0.5)
    turned = [item.turned(turn.order, turn.flips) for item, turn in ((volume.geometry, ours), (theirs, other))]
    assert turned[0].matches(turned[1], 0.05)


@pytest.mark.slow
def test_real_dicom__is_what_gdcm_reads(shared_data):
    folders = sorted({path.parent for path in (shared_data / "ct" / "lungdx_dicom").rglob("*") if path.is_file()})
    compared = 0
    for folder in folders:
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
            names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
            try:
                volume = read_volume(folder)
            except VolumeError:
                continue
            if len(names) == len(volume.voxels) and not volume.irregular and not volume.notes:
                assert_like_itk(volume, sitk.ReadImage(names))
                compared += 1
    assert compared


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["dcm2niix", "plastimatch"])
@pytest.mark.parametrize("kind", ["files", "frames"])
def test_generated_dicom__is_what_other_tools_convert(tmp_path, tool, kind):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    if kind == "files":
        write_series(source, make_hu(0))
    else:
        enhanced_ct(make_hu(0)).save_as(source / "enhanced.dcm", enforce_file_format=True)
    command = {
        "dcm2niix": ["dcm2niix", "-z", "n", "-o", str(out), str(source)],
        "plastimatch": ["plastimatch", "convert", "--input", str(source), "--output-img", str(out / "a.nii")],
    }[tool]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if (tool, kind) == ("plastimatch", "frames"):  # it reads no file of several frames, and says so
        assert done.returncode != 0 and "any known type" in done.stdout + done.stderr
        return
    assert done.returncode == 0, done.stderr
    (converted,) = out.glob("*.nii")
    assert_like_itk(read_volume(source), sitk.ReadImage(str(converted)))
