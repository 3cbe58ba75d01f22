import warnings

import pydicom
import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.privacy import Salt, load_salt
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset

from meddino.core.errors import ConfigError
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.dicom_files import ct_slice

SECRET = "Zebulon"
TEXT_ELEMENTS = [
    "PatientName", "PatientID", "OtherPatientNames", "PatientAddress", "PatientMotherBirthName", "PatientComments",
    "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "InstitutionName", "InstitutionAddress",
    "StudyDescription", "SeriesDescription", "ProtocolName", "StudyID", "AccessionNumber", "ImageComments", "StationName",
    "Manufacturer", "ManufacturerModelName", "ConvolutionKernel", "BodyPartExamined", "AdditionalPatientHistory",
    "RequestedProcedureDescription", "DeviceSerialNumber", "AcquisitionComments", "DerivationDescription", "EthnicGroup",
]  # fmt: skip


def planted(index: int, plane) -> pydicom.Dataset:
    item = ct_slice(plane, 5.0 * index)
    for name in TEXT_ELEMENTS:
        if dictionary_VR(tag_for_keyword(name)) != "SQ":
            setattr(item, name, f"{SECRET}{name}"[:16])
    item.PatientBirthDate, item.StudyDate = "19120623", "20190817"
    sequence = Dataset()
    sequence.CodeMeaning = SECRET
    item.ProcedureCodeSequence = [sequence]
    item.add_new(0x00091001, "LO", f"{SECRET} private")
    return item


def test_build__no_name_path_or_date_reaches_any_byte_of_the_output(tmp_path, salt_file, capsys):
    root = tmp_path / f"{SECRET}_study"
    folder = root / f"{SECRET}_Jane" / "19120623"
    folder.mkdir(parents=True)
    for index, plane in enumerate(make_hu(0)):
        planted(index, plane).save_as(folder / f"{SECRET}_{index}.dcm", enforce_file_format=True)
    write_volume(root / f"{SECRET}.nii.gz", make_hu(1))
    write_volume(root / f"{SECRET}_copy.nrrd", make_hu(1))
    (root / f"{SECRET}_broken.nii.gz").write_bytes(b"\x1f\x8b nothing")
    scout = planted(99, make_hu(2)[0])
    scout.ImageType, scout.SeriesInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], "1.2.3.4.5"
    scout.save_as(folder / "scout", enforce_file_format=True)
    capsys.readouterr()  # pydicom's words on what was planted just now
    out = tmp_path / "out"
    for workers, where in ((1, out), (2, tmp_path / "two")):
        arguments = ["build", str(root), "--out", str(where), f"workers={workers}", f"privacy.salt_file={salt_file}"]
        assert main(arguments) == 0
    needles = [SECRET, SECRET.lower(), "19120623", "20190817", "1.2.3.4.5"]
    searched = 0
    for path in [*out.rglob("*"), *(tmp_path / "two").rglob("*")]:
        text = path.read_bytes() if path.is_file() else b""
        searched += len(text)
        for needle in needles:
            assert needle.encode() not in text, (path.name, needle)
            assert needle not in str(path.relative_to(tmp_path))
    assert searched > 100_000
    log = capsys.readouterr()
    assert SECRET not in log.err.replace(str(root), "") + log.out
    source_map = (tmp_path / "out.private" / "sources.jsonl").read_text()
    assert f"{SECRET}.nii.gz" in source_map  # the owner can find a volume again
    assert (tmp_path / "out.private").stat().st_mode & 0o077 == 0


def test_read_header__values_that_pydicom_finds_wrong_are_not_quoted(tmp_path, capfd, caplog, recwarn):
    """pydicom warns of an id of more than 64 characters, or of a wrong birth date, and quotes it."""
    from meddino_data_curation.dicom_headers import read_header

    path = tmp_path / "slice"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        item = ct_slice(make_hu(0)[0], 0.0, PatientID=SECRET * 12, PatientBirthDate=f"{SECRET} 1912", StudyInstanceUID=SECRET)
        item.save_as(path, enforce_file_format=True)
    plain = pydicom.dcmread(path)
    assert [str(plain.get(name)) for name in ("PatientID", "PatientBirthDate", "StudyInstanceUID")]
    assert SECRET in caplog.text + "".join(str(warning.message) for warning in recwarn)  # it does so for everybody else
    caplog.clear()
    capfd.readouterr()
    recwarn.clear()
    header = read_header(path, "slice", "")
    assert header.patient_id == SECRET * 12
    heard = "".join([caplog.text, *capfd.readouterr(), *(str(warning.message) for warning in recwarn)])
    assert SECRET not in heard


def test_load_salt__made_once_and_kept_outside(tmp_path):
    first, again = load_salt(None, tmp_path / "corpus"), load_salt(None, tmp_path / "corpus")
    assert first.fingerprint == again.fingerprint
    assert (tmp_path / "corpus.private" / "salt").stat().st_mode & 0o077 == 0
    assert load_salt(None, tmp_path / "other").fingerprint != first.fingerprint


@pytest.mark.parametrize(("text", "words"), [("short", "at least 8"), (None, "cannot be read")])
def test_load_salt__wrong_files_are_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "salt").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_salt(tmp_path / "salt", tmp_path / "corpus")


def test_load_salt__inside_the_corpus_is_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "salt").write_text("a long enough salt")
    with pytest.raises(ConfigError, match="inside the corpus"):
        load_salt(tmp_path / "corpus" / "salt", tmp_path / "corpus")


def test_salt__kinds_and_parts_are_told_apart():
    salt = Salt(b"secret")
    assert len({salt.key("patient", "a", "b"), salt.key("patient", "ab"), salt.key("volume", "a", "b")}) == 3
