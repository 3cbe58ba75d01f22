import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_evaluation.data.pictures import pixel_grid, read_planes
from meddino_evaluation.data.prepare import GridRule, prepare_volume
from PIL import Image

from meddino.core.errors import VolumeError
from meddino.data.content import slice_hash
from meddino.volumes.orientation import Turn, turn_to_lps
from meddino.volumes.read import read_label_map, read_volume
from meddino.volumes.writing import write_label_map


def rotation(degrees: float, axis: int) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(3)
    a, b = [i for i in range(3) if i != axis]
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


ORIENTATIONS = {
    "lps": np.eye(3),
    "ras": np.diag([-1.0, -1.0, 1.0]),
    "head_first": np.diag([1.0, 1.0, -1.0]) @ np.diag([-1.0, 1.0, 1.0]),
    "sagittal": np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]], dtype=float),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=float),
    "oblique": rotation(20, 0) @ rotation(-14, 2),
    "oblique_ras": np.diag([-1.0, -1.0, 1.0]) @ rotation(25, 1),
}


def save(path: Path, array: np.ndarray, direction: np.ndarray, spacing=(0.7, 0.8, 3.3)) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin((12.5, -31.25, 7.0))
    image.SetDirection(tuple(direction.reshape(-1)))
    sitk.WriteImage(image, str(path))
    return image


@pytest.mark.parametrize("name", ORIENTATIONS)
@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_label_map__lies_exactly_where_its_image_lies(tmp_path, name, ending):
    rng = np.random.default_rng(0)
    array = rng.integers(-1000, 1000, (5, 7, 6)).astype(np.int16)
    save(tmp_path / f"image{ending}", array, ORIENTATIONS[name])
    volume = read_volume(tmp_path / f"image{ending}")
    values, geometry = volume.voxels, volume.geometry
    np.testing.assert_array_equal(values, array)
    labels = rng.integers(0, 5, array.shape)
    write_label_map(tmp_path / f"label{ending}", labels, geometry)
    image, label = (sitk.ReadImage(str(tmp_path / f"{kind}{ending}")) for kind in ("image", "label"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), labels)
    assert label.GetSize() == image.GetSize()
    np.testing.assert_allclose(label.GetSpacing(), image.GetSpacing(), atol=1e-6)
    np.testing.assert_allclose(label.GetOrigin(), image.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(label.GetDirection(), image.GetDirection(), atol=1e-6)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_turn__brings_axes_to_lps_and_back(tmp_path, name):
    array = np.arange(5 * 7 * 6, dtype=np.int16).reshape(5, 7, 6)
    save(tmp_path / "a.mha", array, ORIENTATIONS[name])
    volume = read_volume(tmp_path / "a.mha")
    values, geometry = volume.voxels, volume.geometry
    turn = turn_to_lps(geometry)
    turned = turn.apply(values)
    np.testing.assert_array_equal(turn.undo(turned), array)
    # SimpleITK's own reorientation is the judge.
    theirs = sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "a.mha")), "LPS")
    np.testing.assert_array_equal(turned, sitk.GetArrayFromImage(theirs))
    np.testing.assert_allclose(turn.spacing_mm(geometry), theirs.GetSpacing()[::-1])


@pytest.mark.parametrize("rule", [GridRule(), GridRule(spacing_mm=1.5), GridRule(size_px=31)])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_prepared_label__comes_back_to_the_source_grid(tmp_path, name, rule):
    label = np.zeros((8, 16, 20), dtype=np.uint8)
    label[2:6, 4:12, 5:15] = 3
    save(tmp_path / "label.nii.gz", label, ORIENTATIONS[name], spacing=(1.5, 1.5, 1.5))
    values, geometry = read_label_map(tmp_path / "label.nii.gz")
    case = prepare_volume("a", values[None].astype(np.int16), geometry, rule, values)
    slices = np.stack([case.label(z) for z in range(case.num_slices)])
    rows, cols = case.source_plane
    back = case.to_source(slices[:, np.arange(rows) * slices.shape[1] // rows][:, :, np.arange(cols) * slices.shape[2] // cols])
    assert back.shape == label.shape
    overlap = 2 * ((back == 3) & (label == 3)).sum() / ((back == 3).sum() + (label == 3).sum())
    assert overlap == 1.0 if rule == GridRule() else overlap > 0.85
    assert case.present[case.num_slices // 2] == {3}


def test_read_volume__bad_files(tmp_path):
    (tmp_path / "no.nii.gz").write_bytes(b"not an image")
    with pytest.raises(VolumeError, match=r"no\.nii\.gz: named \.nii\.gz and holds none"):
        read_volume(tmp_path / "no.nii.gz")
    with pytest.raises(VolumeError, match="does not exist"):
        read_volume(tmp_path / "absent.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4, 5), dtype=np.float32)), str(tmp_path / "four.nii.gz"))
    with pytest.raises(VolumeError, match="5 time points"):
        read_volume(tmp_path / "four.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(np.full((2, 3, 4), 0.5, dtype=np.float32)), str(tmp_path / "half.nii.gz"))
    with pytest.raises(VolumeError, match="no label map"):
        read_label_map(tmp_path / "half.nii.gz")


def test_read_volume__a_truncated_file_is_refused(tmp_path):
    save(tmp_path / "a.nii", np.zeros((20, 30, 30), dtype=np.int16), np.eye(3))
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(data[: len(data) // 2])
    with pytest.raises(VolumeError, match=r"a\.nii"):
        read_volume(tmp_path / "a.nii")


def test_read_volume__a_damaged_compressed_file_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(-1000, 1000, (40, 60, 60)).astype(np.int16)
    save(tmp_path / "a.nii.gz", noise, np.eye(3))
    data = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(VolumeError, match=r"a\.nii\.gz: .*damaged"):
        read_volume(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").write_bytes(data[:-8] + bytes(4) + data[-4:])  # another checksum
    with pytest.raises(VolumeError, match=r"a\.nii\.gz: .*damaged"):
        read_volume(tmp_path / "a.nii.gz")


def test_turn__every_permutation_and_flip_is_undone():
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            turn = Turn(order, flips)
            np.testing.assert_array_equal(turn.undo(turn.apply(array)), array)


@pytest.mark.parametrize("shape", [(7, 9, 3), (7, 9)])
def test_content_hash__of_a_picture_is_that_of_the_slice_which_a_corpus_stores(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    planes = read_planes(tmp_path / "a.png", 3)
    case = prepare_volume("a", planes, pixel_grid(7, 9), GridRule(size_px=8), modality="image")
    assert case.content_hash == slice_hash(pixels)


def test_content_hash__of_several_channels_the_first_counts():
    values = np.random.default_rng(0).integers(0, 2000, (3, 1, 7, 9), dtype=np.uint16)
    case = prepare_volume("a", values, pixel_grid(7, 9), GridRule(size_px=8), modality="mr")
    assert case.content_hash == slice_hash(values[0, 0])
