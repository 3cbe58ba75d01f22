"""Measured on real scans: every guise of a scan is found, and no two patients are taken for one."""

import logging
import re
from itertools import combinations

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_data_curation.config import CurationConfig, SourceConfig
from meddino_data_curation.held_out.scan import scan
from meddino_data_curation.privacy import Salt
from meddino_data_curation.selection import duplicates
from meddino_data_curation.selection.duplicates import mark_near
from meddino_data_curation.selection.fingerprint import Fingerprint, chosen_slices, flipped, slice_vector
from meddino_data_curation.selection.modality import Recognised
from meddino_data_curation.selection.near_duplicates import Likeness, candidate_pairs, compare, find_alike, groups
from meddino_data_curation.sources.dicom_series import DicomCandidate
from meddino_data_curation.sources.discovery import discover
from scipy import ndimage

from meddino.volumes.dicom.pixels import read_dicom_volume
from meddino.volumes.formats.itk import read_volume_file
from meddino.volumes.orientation import to_axial_lps
from tests.data_curation.conftest import make_hu

LOGGER = logging.getLogger(__name__)  # the measured figures: pytest -o log_cli=true --log-cli-level=INFO


def fingerprint(hu: np.ndarray, spacing_mm=(5.0, 1.0, 1.0)) -> Fingerprint:
    looks = [(z * spacing_mm[0], slice_vector(np.ascontiguousarray(hu[z]), spacing_mm[1:])) for z in chosen_slices(len(hu))]
    kept = [(place, vector) for place, vector in looks if vector is not None]
    return Fingerprint(np.array([place for place, _ in kept]), np.array([vector for _, vector in kept]))


def guises(hu: np.ndarray, spacing_mm, rng: np.random.Generator):
    """Yield (kind, HU, spacing) of a scan as it turns up again elsewhere."""
    turned = rng.integers(3)
    yield "flipped", np.flip(hu, turned if turned == 0 and len(hu) > 1 else 1 + turned % 2), spacing_mm
    yield "window clipped", np.clip(hu, -160, 240), spacing_mm
    factors = (0.75 if len(hu) > 4 else 1.0, 0.75, 0.75)
    smaller = np.rint(ndimage.zoom(hu.astype(np.float32), factors, order=1)).astype(np.int16)
    yield "resampled x0.75", smaller, tuple(step / factor for step, factor in zip(spacing_mm, factors, strict=True))
    start = rng.integers(len(hu) - max(1, int(0.6 * len(hu))) + 1)
    yield "z-cropped to 60 %", hu[start : start + max(1, int(0.6 * len(hu)))], spacing_mm
    yield "noised by 10 HU", np.rint(hu + rng.normal(0, 10, hu.shape)).astype(np.int16), spacing_mm
    yield "padded", np.pad(hu, ((0, 0), (20, 60), (70, 10)), constant_values=-1024), spacing_mm


@pytest.fixture(scope="module")
def real_volumes(shared_data):
    """Name, patient, HU and spacing of every volume of shared ct and Dataset901."""
    sources = [
        SourceConfig(name="ct", path=shared_data / "ct"),
        SourceConfig(name="sarcoma", path=shared_data / "segmentation/Dataset901_SarcomaCT/imagesTr"),
    ]
    limits = CurationConfig().limits
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    volumes = []
    for candidate in discover(sources, Salt(b"for tests")).candidates:
        is_dicom = isinstance(candidate, DicomCandidate)
        read = read_dicom_volume(candidate.stack, limits) if is_dicom else None
        volume = read or read_volume_file(candidate.files[0], candidate.format, limits)
        upright, _ = to_axial_lps(volume, 35.0)
        hu = np.stack([Recognised("ct").stored(plane) for plane in upright.planes])
        name = "lungdx_dicom" if is_dicom else candidate.source_path
        patient = re.search(r"TCGA-\w\w-\w+|A0\d{5}|STS_\d+|LIDC-IDRI-\d+|CRLM-CT-\d+|A0001|spine|lungdx", name).group()
        volumes.append((name, "A0001" if patient == "lungdx" else patient, hu, upright.geometry.spacing_mm))
    return volumes


def test_near_duplicates__recall_and_precision_on_real_scans(real_volumes):
    rng = np.random.default_rng(0)
    prints, labels = [], []
    for name, patient, hu, spacing in real_volumes:
        prints.append(fingerprint(hu, spacing))
        labels.append((name, patient, "original"))
        for kind, changed, new_spacing in guises(hu, spacing, rng):
            prints.append(fingerprint(changed, new_spacing))
            labels.append((name, patient, kind))
    alike = find_alike(prints)
    linked = {(pair.first, pair.second) for pair in alike}
    original = {name: index for index, (name, _, kind) in enumerate(labels) if kind == "original"}
    kinds = sorted({kind for _, _, kind in labels} - {"original"})
    for kind in kinds:
        planted = [(original[name], index) for index, (name, _, own) in enumerate(labels) if own == kind]
        recall = np.mean([pair in linked for pair in planted])
        LOGGER.info("%s: recall %.3f of %d", kind, recall, len(planted))
        assert recall >= 0.95, kind
    wrong = {(labels[a][1], labels[b][1]) for a, b in linked if labels[a][1] != labels[b][1]}
    assert not wrong
    merged = [{labels[index][1] for index in group} for group in groups(len(prints), sorted(linked))]
    assert all(len(patients) == 1 for patients in merged)
    candidates = candidate_pairs(prints)
    LOGGER.info("%d candidates among %d volumes, %d alike", len(candidates), len(prints), len(linked))
    assert len(candidates) < 1.5 * len(linked)  # the index, not the comparison, keeps the work small
    lungdx = [original[name] for name in original if "lungdx" in name]
    assert len(lungdx) == 3  # two kernels of one scan and its DICOM subset at another size
    assert all(pair in linked for pair in combinations(sorted(lungdx), 2))


def test_compare__flips_in_plane_and_in_z_are_found():
    hu = make_hu(1, (10, 64, 72))
    plain = fingerprint(hu)
    for changed in (hu[:, ::-1], hu[:, :, ::-1], hu[::-1], hu[::-1, ::-1, ::-1]):
        similarity, share = compare(plain, fingerprint(changed))
        assert similarity > 0.99
        assert share == 1.0


def test_compare__another_patient_and_shuffled_slices_are_not():
    hu = make_hu(1, (10, 64, 72))
    assert compare(fingerprint(hu), fingerprint(make_hu(2, (10, 64, 72)))) is None


def test_flipped__is_the_vector_of_the_flipped_slice():
    hu = make_hu(3)[2]
    vector = slice_vector(hu, (1.0, 1.0))
    turned = slice_vector(np.ascontiguousarray(hu[::-1]), (1.0, 1.0))
    assert np.abs(flipped(vector[None], rows=True, cols=False)[0].astype(int) - turned).max() <= 1
    turned = slice_vector(np.ascontiguousarray(hu[:, ::-1]), (1.0, 1.0))
    assert np.abs(flipped(vector[None], rows=False, cols=True)[0].astype(int) - turned).max() <= 1


def test_slice_vector__air_has_none():
    assert slice_vector(np.full((64, 64), -1000, np.int16), (1.0, 1.0)) is None


def test_candidate_pairs__finds_a_noised_copy():
    prints = [fingerprint(make_hu(seed, (4, 64, 72))) for seed in range(30)]
    noise = np.random.default_rng(0).normal(0, 10, (4, 64, 72))
    prints.append(fingerprint(np.rint(make_hu(7, (4, 64, 72)) + noise).astype(np.int16)))
    assert (7, 30) in candidate_pairs(prints)


def test_find_alike__nothing_among_nothing():
    assert find_alike([]) == []
    empty = Fingerprint(np.zeros(0), np.zeros((0, 255), np.int8))
    assert find_alike([empty, empty]) == []


def test_groups__are_connected_components():
    assert sorted(groups(6, [(0, 1), (1, 4), (2, 3)])) == [[0, 1, 4], [2, 3]]


def test_fingerprint__json_round_trip():
    before = fingerprint(make_hu(5))
    after = Fingerprint.from_json(before.to_json())
    assert np.array_equal(before.vectors, after.vectors)
    assert np.allclose(before.places_mm, after.places_mm, atol=1e-3)


def test_content_hash__does_not_depend_on_format_type_and_orientation(shared_data, tmp_path):
    """Every real volume re-saved another way has the same content hash, and no two others have."""
    sources = [
        SourceConfig(name="ct", path=shared_data / "ct"),
        SourceConfig(name="sarcoma", path=shared_data / "segmentation/Dataset901_SarcomaCT/imagesTr"),
    ]
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    ways = [("nrrd", sitk.sitkFloat64, "RAS"), ("mha", sitk.sitkInt32, "PIR"), ("nii", sitk.sitkFloat32, "LPI")]
    names = {}
    for number, candidate in enumerate(discover(sources, Salt(b"for tests")).candidates):
        if isinstance(candidate, DicomCandidate):
            continue
        ending, pixel, orientation = ways[number % 3]
        image = sitk.Cast(sitk.DICOMOrient(sitk.ReadImage(str(candidate.files[0])), orientation), pixel)
        sitk.WriteImage(image, str(tmp_path / f"{number}.{ending}"))
        names[f"{number}.{ending}"] = (sources[candidate.source].name, candidate.source_path)
    config = CurationConfig(workers=1)
    found = scan([*sources, SourceConfig(name="again", path=tmp_path)], config, Salt(b"for tests"))
    content = {(row["dataset"], found.places[row["volume_id"]]): row["content_hash"] for row in found.rows}
    assert len(names) == 109
    missed = [name for name, origin in names.items() if content["again", name] != content[origin]]
    assert not missed


def _one_slice(number: int, hu: np.ndarray, z_mm: float, **changes) -> tuple[dict, Fingerprint]:
    row = {"volume_id": f"v{number:02d}", "status": "accepted", "dataset": "set", "num_slices_kept": 1, "shape": [1, *hu.shape]}
    row |= {"spacing_mm": [2.0, 4.5, 4.5], "content_hash": f"h{number:02d}", "patient_key": "P", "study_key": None}
    row |= {"position_mm": z_mm, "duplicate_of": None, "duplicate_kind": None, "format": "nifti", "series_key": None, **changes}
    return row, Fingerprint(np.zeros(1), np.stack([slice_vector(hu, (4.5, 4.5))]))


@pytest.mark.parametrize(
    ("step_mm", "changes", "kept"),
    [(2.0, {}, 12), (0.0, {}, 1), (2.0, {"patient_key": None}, 1), (2.0, {"patient_key": None, "study_key": "S"}, 12)],
    ids=["one patient", "one place", "nobody known", "one study"],
)
def test_mark_near__slices_of_one_patient_at_other_places_are_no_copies(step_mm, changes, kept):
    """The same picture twelve times over: neighbouring slices differ less than that."""
    rows, prints = zip(
        *(_one_slice(number, make_hu(0)[3], 50.0 + step_mm * number, **changes) for number in range(12)), strict=True
    )
    mark_near(rows, {row["volume_id"]: one for row, one in zip(rows, prints, strict=True)}, {})
    assert sum(row["status"] == "accepted" for row in rows) == kept


def test_mark_near__parts_of_one_series_are_no_copies_of_each_other():
    """Two energies of one scan look alike; of what another set holds of it one is a copy."""
    told = [{"format": "dicom", "series_key": "S", "num_slices_kept": kept} for kept in (9, 8, 7)]
    rows, prints = zip(
        *(_one_slice(number, make_hu(0)[3], 50.0, **changes) for number, changes in enumerate([*told, {}])), strict=True
    )
    rows[2]["dataset"] = "another"
    mark_near(rows, {row["volume_id"]: one for row, one in zip(rows, prints, strict=True)}, {})
    assert [row["status"] for row in rows] == ["accepted", "accepted", "duplicate", "duplicate"]


def test_mark_near__few_slices_of_one_patient_make_no_chain(monkeypatch):
    """Without a place 0 is like 1 and 1 like 2, but 0 is not like 2: of the three 0 and 2 stay."""
    pictures = [make_hu(0)[3], make_hu(1)[3], make_hu(2)[3]]
    rows, prints = zip(*(_one_slice(number, hu, 0.0) for number, hu in enumerate(pictures)), strict=True)
    monkeypatch.setattr(duplicates, "find_alike", lambda _: [Likeness(0, 1, 0.97, 1.0), Likeness(1, 2, 0.97, 1.0)])
    mark_near(rows, {row["volume_id"]: one for row, one in zip(rows, prints, strict=True)}, {})
    assert [row["status"] for row in rows] == ["accepted", "duplicate", "accepted"]
    assert rows[1]["duplicate_of"] == "v00"
