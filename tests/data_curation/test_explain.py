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


def test_explain__needs_something_to_explain(tmp_path, capsys):
    assert main(["explain", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
