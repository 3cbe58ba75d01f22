from meddino_data_curation.cli import main

from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.dicom_files import ct_slice, write_series


def test_explain__says_what_was_recognised_what_decided_and_what_becomes_of_it(tmp_path, capsys):
    write_series(tmp_path / "in" / "ct", make_hu(0))
    scout = ct_slice(make_hu(1)[0], 0.0, series="scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    scout.save_as(tmp_path / "in" / "scout", enforce_file_format=True)
    write_volume(tmp_path / "in" / "mask.nii.gz", (make_hu(2) > 0).astype("uint8"))
    write_volume(tmp_path / "in" / "scan.nrrd", make_hu(3))
    assert main(["explain", str(tmp_path / "in")]) == 0
    said = capsys.readouterr().out
    for words in (
        "7 x DICOM file", "volumes: 3, and 1 refused unread", "6 slices of 64 x 72 px, CT", "x 1 -1024",
        "accepted: 6 slices of ct", "units are not in the file", "refused: looks like a label map",
        "refused: DICOM: localiser or scout",
    ):  # fmt: skip
        assert words in said, words
    assert "Doe" not in said
    assert "P1" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_explain__what_lies_beside_a_ct_in_one_folder_is_named_each_with_its_reason(tmp_path, capsys):
    folder = tmp_path / "PATIENT"
    write_series(folder, make_hu(0), PixelSpacing=[4.5, 4.0])
    (folder / "DICOMDIR").write_bytes(b"index")
    storage = "1.2.840.10008.5.1.4.1.1."
    pictures = {
        "scout": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "PixelSpacing": [1.0, 0.5]},
        "capture": {"SOPClassUID": f"{storage}7", "Modality": "OT"},
    }
    without = dict.fromkeys(("Rows", "Columns", "PixelData", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"))
    documents = {
        "dose": {"SOPClassUID": f"{storage}88.67", "Modality": "SR"},
        "structures": {"SOPClassUID": f"{storage}481.3", "Modality": "RTSTRUCT"},
        "labels": {"SOPClassUID": f"{storage}66.4", "Modality": "SEG"},
    }
    for name, changes in (pictures | {name: without | changes for name, changes in documents.items()}).items():
        ct_slice(make_hu(1)[0], 0.0, series=name, **changes).save_as(folder / name, enforce_file_format=True)
    assert main(["explain", str(folder)]) == 0
    said = capsys.readouterr().out
    for words in (
        "11 x DICOM file", "1 x DICOMDIR (not needed)", "volumes: 1, and 5 refused unread", "pixels of 4.5 x 4 mm",
        "6 x 64 x 72 voxels of 5 x 4.5 x 4 mm", "accepted: 6 slices of ct", "refused: DICOM: localiser or scout",
        "refused: DICOM: secondary capture", "not a CT image but X-Ray Radiation Dose SR Storage",
        "not a CT image but RT Structure Set Storage", "not a CT image but Segmentation Storage",
    ):  # fmt: skip
        assert words in said, words


def test_explain__needs_something_to_explain(tmp_path, capsys):
    assert main(["explain", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
