import functools
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from meddino_data_curation.cli import main
from meddino_data_curation.phantom.canvas import Grid
from meddino_data_curation.phantom.cohort import CohortSizes, write_cohort
from meddino_data_curation.phantom.patient import LABELS
from meddino_data_curation.phantom.scan import scan_patient

from meddino.core.errors import ConfigError
from meddino.core.files import sha256_file


def _hashes(root: Path) -> dict[str, str]:
    return {str(file.relative_to(root)): sha256_file(file) for file in sorted(root.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """One NIfTI, one DICOM series, three labelled patients."""
    folder = tmp_path_factory.mktemp("phantom") / "cohort"
    assert main(["phantom", "--out", str(folder), "--patients", "2", "--seed", "3"]) == 0
    return folder


def test_phantom__same_seed_same_bytes_other_seed_other_bytes(cohort, tmp_path):
    for name, seed in (("b", 3), ("c", 4)):
        assert main(["phantom", "--out", str(tmp_path / name), "--patients", "2", "--seed", str(seed)]) == 0
    first, second, other = (_hashes(folder) for folder in (cohort, tmp_path / "b", tmp_path / "c"))
    assert first == second
    assert len(first) > 20
    assert not set(first.values()) & set(other.values()) - {first["segmentation/Dataset900_Phantom/dataset.json"]}


def test_phantom__layout_is_nnunet_raw_and_masks_lie_on_their_images(cohort):
    dataset = cohort / "segmentation" / "Dataset900_Phantom"
    for part, cases in (("Tr", 2), ("Ts", 1)):
        images = sorted((dataset / f"images{part}").iterdir())
        assert len(images) == cases
        for image in images:
            label = dataset / f"labels{part}" / image.name.replace("_0000", "")
            first, second = sitk.ReadImage(str(image)), sitk.ReadImage(str(label))
            assert first.GetSize() == second.GetSize()
            assert first.GetOrigin() == second.GetOrigin()
            assert set(np.unique(sitk.GetArrayFromImage(second))) == set(LABELS.values())


@pytest.fixture(scope="module")
def scanned():
    """`scan_patient`, each patient once."""
    return functools.cache(scan_patient)


@pytest.mark.parametrize("number", range(4))
def test_phantom__organs_have_plausible_values_and_sizes(number, scanned):
    scan = scanned(0, "segmentation", number)
    voxel_ml = float(np.prod(scan.spacing_mm)) / 1000
    bounds = {  # median HU and ml: from no contrast agent to arterial phase, small to large adults
        "lung": (-920, -700, 1200, 7000),
        "heart": (30, 260, 240, 1000),
        "liver": (20, 140, 700, 2600),
        "spleen": (30, 150, 40, 600),
        "kidneys": (20, 220, 100, 600),
        "bone": (120, 900, 300, 2500),
    }
    for organ, (hu_low, hu_high, ml_low, ml_high) in bounds.items():
        inside = scan.labels == LABELS[organ]
        assert hu_low <= np.median(scan.hu[inside]) <= hu_high, organ
        assert ml_low <= inside.sum() * voxel_ml <= ml_high, organ
    liver_x, spleen_x = (np.nonzero(scan.labels == LABELS[organ])[2].mean() for organ in ("liver", "spleen"))
    lung_z, kidney_z = (np.nonzero(scan.labels == LABELS[organ])[0].mean() for organ in ("lung", "kidneys"))
    assert liver_x < spleen_x  # x runs to the left side of the patient
    assert kidney_z < lung_z  # z runs to the head


def test_phantom__patients_of_different_roles_and_numbers_differ(scanned):
    scans = [scanned(0, role, number) for role in ("ct", "segmentation") for number in range(2)]
    assert len({scan.hu.tobytes() for scan in scans}) == 4


def test_phantom__dicom_series_reads_back_as_the_same_volume(cohort):
    (folder,) = (cohort / "ct").glob("patient_*_dicom")
    slices = sorted((pydicom.dcmread(file) for file in folder.iterdir()), key=lambda item: item.ImagePositionPatient[2])
    hu = np.stack([item.pixel_array.astype(np.int32) + int(item.RescaleIntercept) for item in slices])
    assert np.array_equal(hu, scan_patient(3, "ct", int(folder.name.split("_")[1])).hu)


def test_phantom__smooth_noise_has_unit_spread():
    grid = Grid.regular((40, 60, 60), (4.0, 4.0, 4.0), (0.0, 0.0, 0.0))
    noise = grid.smooth_noise(np.random.default_rng(0), 12.0)
    assert abs(noise.std() - 1) < 0.15
    assert abs(noise.mean()) < 0.15


def test_phantom__wrong_out_or_count_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["phantom", "--out", str(tmp_path)]) == 2
    assert "mine.txt" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    with pytest.raises(ConfigError, match="at least 1"):
        CohortSizes.scaled(0)


def test_write_cohort__a_finished_one_is_left_as_it_is(tmp_path):
    sizes = CohortSizes(ct=1, train=1, test=1)
    write_cohort(tmp_path, sizes, seed=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_cohort(tmp_path, sizes, seed=0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    write_cohort(tmp_path, sizes, seed=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} != before


def test_phantom__patients_are_no_near_duplicates_of_one_another(tmp_path):
    from meddino.data.corpus import Corpus

    write_cohort(tmp_path / "cohort", CohortSizes(ct=3, train=0, test=0), seed=0)
    assert main(["build", str(tmp_path / "cohort" / "ct"), "--out", str(tmp_path / "corpus"), "workers=1"]) == 0
    assert Corpus(tmp_path / "corpus").info["totals"]["accepted"] == 3
