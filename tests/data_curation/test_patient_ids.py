"""Which ids mean the same patient in every source."""

import pytest
from meddino_data_curation.config import SourceConfig
from meddino_data_curation.privacy import Salt
from meddino_data_curation.sources.discovery import discover
from meddino_data_curation.sources.patient_ids import (
    is_nobody,
    key_everywhere,
    means_the_same_everywhere,
    normal_id,
    patient_id,
    told_by_name,
    without_common_names,
)

from tests.data_curation.conftest import make_hu
from tests.data_curation.dicom_files import write_series

SALT = Salt(b"for tests")


@pytest.mark.parametrize(
    ("origin", "written"),
    [
        *[("header", text) for text in ("LIDC-IDRI-0314", "731955", "PAT-000123", "case_00012", "P0012", "A1B2C")],
        *[("name", text) for text in ("LIDC-IDRI-0314", "731955", "PAT-000123", "amos_0005", "s0012", "BDMAP_00000001")],
        ("pattern", "patient_12"),
    ],
)
def test_means_the_same_everywhere__ids(origin, written):
    assert means_the_same_everywhere(written, origin)


@pytest.mark.parametrize(
    ("origin", "written"),
    [
        *[("header", text) for text in ("", "0", "1", "P7", "ANONYMOUS", "Anonymous^", "case_07", "Doe^Jane", "0000")],
        *[("name", text) for text in ("case_00012", "patient_000123", "volume-12", "img0001", "ct", "thorax", "scan_1")],
        ("pattern", "12"),
    ],
)
def test_means_the_same_everywhere__words_and_running_numbers(origin, written):
    assert not means_the_same_everywhere(written, origin)


def test_normal_id__spellings_of_one_id():
    assert len({normal_id(text) for text in ("LIDC-IDRI-0314", "lidc_idri_0314", " LIDC IDRI 0314", "LIDC-IDRI0314")}) == 1
    assert normal_id("00731955") == normal_id("731955")
    others = ["PANCREAS_0001", "pancreas_001", "A-01-2", "A-0-12", "12", "1-2", "^^^", "0", "Müller 1"]
    assert len({normal_id(text) for text in others}) == len(others)


def test_patient_id__nobody_is_not_one_patient():
    """Else a single overlap would lead to everything that a tool anonymised."""
    studies = [patient_id(SALT, "s", "ANONYMOUS", "header", study) for study in ("1.2", "1.3")]
    assert studies[0].key != studies[1].key
    assert not any(who.is_known for who in studies)
    assert is_nobody("N/A")


def test_discover__a_file_name_and_a_header_with_one_id_are_one_patient(tmp_path):
    (tmp_path / "nnunet").mkdir()
    (tmp_path / "nnunet" / "PAT-000123_0000.nii.gz").write_bytes(b"-")
    write_series(tmp_path / "dicom", make_hu(0, (2, 8, 8)), patient="PAT-000123")
    sources = [SourceConfig(name=name, path=tmp_path / name) for name in ("nnunet", "dicom")]
    found = discover(sources, SALT).candidates
    assert [item.patient_key for item in found] == [key_everywhere(SALT, "PAT-000123")] * 2
    assert all(item.patient_is_known for item in found)
    assert "PAT" not in repr(found[0]).replace(found[0].source_path, "").replace(str(found[0].files), "")


def test_without_common_names__a_name_in_every_folder_is_nobodys(tmp_path):
    for number in range(12):
        for name in ("thorax_5mm.nii.gz", f"PAT-0{number}.nii.gz"):
            (tmp_path / f"p{number}").mkdir(exist_ok=True)
            (tmp_path / f"p{number}" / name).write_bytes(b"-")
    source = SourceConfig(name="s", path=tmp_path)
    before = discover([source], SALT).candidates
    assert len({item.patient_key for item in before}) == 13
    after = without_common_names(before, [source], SALT)
    assert len({item.patient_key for item in after}) == 24
    assert {item.patient_is_known for item in after if "thorax" in item.source_path} == {False}
    assert {item.patient_is_known for item in after if "PAT" in item.source_path} == {True}
    assert told_by_name(after, [source]) == 12
    assert told_by_name(after, [source.model_copy(update={"patient_pattern": "^([^/]+)/"})]) == 0


def test_discover__an_optional_group_that_matched_nothing_is_no_crash(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"-")
    source = SourceConfig(name="s", path=tmp_path, patient_pattern="(?:id(.))?a")
    (item,) = discover([source], SALT).candidates
    assert not item.patient_is_known


@pytest.mark.parametrize(("header", "meant"), [("ANONYMOUS", "PAT-000123"), ("LIDC-IDRI-0314", "LIDC-IDRI-0314")])
def test_discover__the_path_tells_where_the_header_names_nobody(tmp_path, header, meant):
    write_series(tmp_path / "PAT-000123" / "ct", make_hu(0, (2, 8, 8)), patient=header)
    source = SourceConfig(name="s", path=tmp_path, patient_pattern="^([^/]+)/")
    (item,) = discover([source], SALT).candidates
    assert item.patient_key == key_everywhere(SALT, meant)
