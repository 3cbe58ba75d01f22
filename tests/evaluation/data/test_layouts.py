import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_evaluation.data.dataset import check_grids, with_patients
from meddino_evaluation.data.labels import LabelScheme, parse_labels
from meddino_evaluation.data.layouts import open_dataset
from meddino_evaluation.data.prepare import GridRule, prepare_case
from meddino_evaluation.data.prepared_cache import prepare_cached

from meddino.core.errors import ConfigError, VolumeError
from meddino.volumes.read import read_volume
from tests.data_curation.conftest import make_hu
from tests.data_curation.dicom_files import in_mm, rtstruct, write_series


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def volumes(root: Path, names: list[str], channel: str = "") -> None:
    for number, name in enumerate(names):
        image = np.random.default_rng(number).integers(-1000, 1000, (3, 8, 9)).astype(np.int16)
        save(root / f"imagesTr/{name}{channel}.nii.gz", image)
        save(root / f"labelsTr/{name}.nii.gz", (image > 500).astype(np.uint8) * 2)


def test_msd__pairs_of_dataset_json(tmp_path):
    volumes(tmp_path, ["liver_1", "liver_0"])
    content = {
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "modality": {"0": "CT"},
        "training": [{"image": f"./imagesTr/liver_{i}.nii.gz", "label": f"./labelsTr/liver_{i}.nii.gz"} for i in (1, 0)],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    data = open_dataset(tmp_path)
    assert [case.name for case in data.cases] == ["liver_0", "liver_1"]
    assert data.labels == LabelScheme(("liver", "tumour"), ((1,), (2,)))
    content["training"][0]["image"] = "../elsewhere.nii.gz"
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="leads out of the data set's folder"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("channels", [1, 2])
def test_msd__the_first_nnunet_lists_cases_and_numbers_their_files(tmp_path, channels):
    for channel in range(channels):
        volumes(tmp_path, ["case_1", "case_0"], f"_{channel:04d}")
    content = {
        "labels": {"0": "background", "2": "dense"},
        "modality": {str(channel): "CT" for channel in range(channels)},
        "training": [{"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"} for i in (1, 0)],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    data = open_dataset(tmp_path)
    assert [case.name for case in data.cases] == ["case_0", "case_1"]
    names = [f"case_0_{channel:04d}.nii.gz" for channel in range(channels)]
    assert [path.name for path in data.cases[0].images] == names
    images, _ = data.read_images(data.cases[0], range(channels))
    assert images.shape == (channels, 3, 8, 9)


def test_nnunet__a_fourth_axis_of_one_time_point_is_read(tmp_path):
    volumes(tmp_path, ["case_0"], "_0000")
    path = tmp_path / "imagesTr/case_0_0000.nii.gz"
    image = sitk.ReadImage(str(path))
    sitk.WriteImage(sitk.JoinSeries([image]), str(path))
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "dense": 2}}))
    data = open_dataset(tmp_path)
    values, grid = data.read_images(data.cases[0], [0])
    assert np.array_equal(values[0], sitk.GetArrayFromImage(image))
    assert data.read_label(data.cases[0], grid).max() == 2


def test_nnunet__names_that_end_like_channels_are_whole_names(tmp_path):
    names = ["case_1", "case_10", "case_1.2_0001", "P.3", "case_0000"]
    volumes(tmp_path, names, "_0000")
    labels = {"other": 1, "background": 0, "dense": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}))
    data = open_dataset(tmp_path)
    assert [case.name for case in data.cases] == sorted(names)
    assert dict(zip(data.labels.names, data.labels.values, strict=True)) == {"other": (1,), "dense": (2,)}


def test_table__folders_and_a_csv(tmp_path):
    volumes(tmp_path, ["a", "b"])
    rows = [
        "case,image,label,patient,site",
        "x,imagesTr/a.nii.gz,labelsTr/a.nii.gz,p1,Ulm",
        "y,imagesTr/b.nii.gz,labelsTr/b.nii.gz,,",
    ]
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    data = open_dataset(tmp_path)
    assert [(case.name, case.patient, case.site) for case in data.cases] == [("x", "p1", "Ulm"), ("y", "y", "")]
    assert data.labels.names == ("2",)
    (tmp_path / "labels.json").write_text(json.dumps({"background": 0, "dense": 2}))
    assert open_dataset(tmp_path).labels.names == ("dense",)
    (tmp_path / "cases.csv").write_text("case,image\nx,a")
    with pytest.raises(ConfigError, match="lacks the column label"):
        open_dataset(tmp_path)


def test_table__as_a_spreadsheet_saves_it(tmp_path):
    volumes(tmp_path, ["a", "b"])
    rows = [
        "case;image;label;patient",
        "x;imagesTr/a.nii.gz;labelsTr/a.nii.gz;Müller ",
        "y;imagesTr/b.nii.gz;labelsTr/b.nii.gz; Müller",
    ]
    for encoding in ("utf-8-sig", "utf-16", "latin-1"):
        (tmp_path / "cases.csv").write_bytes("\r\n".join(rows).encode(encoding))
        assert [case.patient for case in open_dataset(tmp_path).cases] == ["Müller", "Müller"]  # one, for all splits
    (tmp_path / "cases.csv").write_text("\n".join([*rows, rows[1].replace("Müller", "Bauer")]))
    with pytest.raises(ConfigError, match=r"cases\.csv, line 4, column case: 'x'"):
        open_dataset(tmp_path)


def test_patients_csv__a_case_with_two_patients_is_refused(tmp_path):
    volumes(tmp_path, ["a", "b"])
    files = [f"{name},imagesTr/{name}.nii.gz,labelsTr/{name}.nii.gz" for name in "ab"]
    (tmp_path / "cases.csv").write_text("\n".join(["case,image,label", *files]))
    data = open_dataset(tmp_path)
    (tmp_path / "patients.csv").write_bytes("\ufeffcase;patient\na;p1\nb;p1 \n".encode())
    assert {case.patient for case in with_patients(data, None).cases} == {"p1"}
    (tmp_path / "patients.csv").write_text("case,patient\na,p1\nb,p1\na,p2\n")
    with pytest.raises(ConfigError, match=r"patients\.csv, line 4, column case: 'a'"):
        with_patients(data, None)


def test_table__absolute_paths_and_links_are_followed_and_a_path_that_climbs_out_is_not(tmp_path):
    volumes(tmp_path / "store", ["a"])
    root = tmp_path / "set"
    (root / "labels").mkdir(parents=True)
    (root / "labels/a.nii.gz").symlink_to(tmp_path / "store/labelsTr/a.nii.gz")
    image = tmp_path / "store/imagesTr/a.nii.gz"
    (root / "cases.csv").write_text(f"case,image,label\nx,{image},labels/a.nii.gz\n")
    assert open_dataset(root).cases[0].images == (image,)
    (root / "cases.csv").write_text("case,image,label\nx,../store/imagesTr/a.nii.gz,labels/a.nii.gz\n")
    with pytest.raises(ConfigError, match=r"'\.\./store/imagesTr/a\.nii\.gz'"):
        open_dataset(root)


def test_pairs__images_and_labels_of_the_same_name_and_dicom_folders(tmp_path, caplog):
    volumes(tmp_path, ["a", "b"])
    (tmp_path / "imagesTr").rename(tmp_path / "images")
    (tmp_path / "labelsTr").rename(tmp_path / "labels")
    write_series(tmp_path / "images/c", read_volume(tmp_path / "images/b.nii.gz").voxels.astype(np.int16))
    save(tmp_path / "images/alone.nii.gz", np.zeros((2, 4, 4), dtype=np.int16))
    label = sitk.ReadImage(str(tmp_path / "labels/b.nii.gz"))
    label.SetSpacing((4.5, 4.5, 5.0))
    label.SetOrigin((-100.0, -120.0, 0.0))
    sitk.WriteImage(label, str(tmp_path / "labels/c.nii.gz"))
    data = open_dataset(tmp_path)
    assert [case.name for case in data.cases] == ["a", "b", "c"]
    assert "alone" in caplog.text
    check_grids(data)
    np.testing.assert_array_equal(data.read_images(data.case("c"), (0,))[0], data.read_images(data.case("b"), (0,))[0])
    assert data.data_hash(data.cases) == open_dataset(tmp_path).data_hash(data.cases)
    (tmp_path / "images/a.nii.gz").unlink()
    with pytest.raises(VolumeError, match=r"a\.nii\.gz"):
        open_dataset(tmp_path)


def test_labels_use__the_others_count_as_background():
    scheme = parse_labels({"background": 0, "liver": 1, "spleen": 2, "kidney": 5, "ignore": 9}, None, "here").only(["spleen"])
    values = scheme.check(np.array([0, 1, 2, 5, 9], dtype=np.int32), "here")
    assert values.tolist() == [0, 0, 2, 0, -1]
    assert scheme.class_indices(values).tolist() == [0, 0, 1, 0, -1]
    with pytest.raises(ConfigError, match="'lung'"):
        scheme.only(["lung"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"labels": {"background": 0}}, "no label besides background"),
        ({"labels": {"organ": 1}}, 'contain "background": 0'),
        ({"labels": {"background": 0, "organ": "1"}}, "expected a whole number"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "need 'regions_class_order'"),
        ({"labels": {"background": 0, "organ": 1}, "file_ending": 5}, "'file_ending' is 5"),
        ({"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "CT", "1": "PET"}}, "has the channels"),
        ([], "expected an object"),
    ],
)
def test_nnunet_raw__wrong_dataset_json(tmp_path, content, words):
    volumes(tmp_path, ["a"], "_0000")
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises((ConfigError, VolumeError), match=words):
        open_dataset(tmp_path)


def test_nnunet_raw__test_part_with_labels(tmp_path):
    volumes(tmp_path, ["a", "b"], "_0000")
    for kind, name in (("images", "c_0000"), ("labels", "c")):
        save(tmp_path / f"{kind}Ts/{name}.nii.gz", np.zeros((2, 4, 4), dtype=np.uint8))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 2}}))
    data = open_dataset(tmp_path)
    assert [case.name for case in data.test_cases] == ["c"]


def test_no_dataset__one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"dataset\.json .* cases\.csv .* images/"):
        open_dataset(tmp_path)


def test_regions__written_in_their_order():
    scheme = parse_labels({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, [1, 2], "here")
    assert scheme.num_outputs == 2
    assert scheme.ignore == 3
    masks = np.array([[True, True, False], [False, True, False]])
    assert scheme.label_values(masks).tolist() == [1, 2, 0]
    assert scheme.check(np.array([0, 1, 3], dtype=np.int32), "here").tolist() == [0, 1, -1]


def test_labels__values_with_gaps_become_channels_and_come_back():
    scheme = LabelScheme(("a", "b"), ((2,), (7,)), ignore=9)
    values = np.array([0, 7, 2, -1], dtype=np.int32)
    channels = scheme.class_indices(values)
    assert channels.tolist() == [0, 2, 1, -1]
    assert scheme.label_values(channels[:3]).tolist() == [0, 7, 2]


def test_prepared_cache__same_slices_from_disk_and_again_after_a_changed_file(tmp_path):
    volumes(tmp_path, ["a"], "_0000")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 2}}))
    data, rule, cache = open_dataset(tmp_path), GridRule(size_px=6), tmp_path / "cache"
    plain = prepare_case(data, data.cases[0], (0,), rule)
    for _ in range(2):
        kept = prepare_cached(data, data.cases[0], (0,), rule, cache)
        assert (kept.present, kept.turn, kept.content_hash, kept.spacing_mm) == (
            plain.present,
            plain.turn,
            plain.content_hash,
            plain.spacing_mm,
        )
        for z in range(3):
            np.testing.assert_array_equal(kept.image(z).numpy(), plain.image(z).numpy())
            np.testing.assert_array_equal(kept.label(z), plain.label(z))
    assert len(list(cache.iterdir())) == 1
    save(tmp_path / "labelsTr/a.nii.gz", np.full((3, 8, 9), 2, dtype=np.uint8))
    changed = open_dataset(tmp_path)
    assert (prepare_cached(changed, changed.cases[0], (0,), rule, cache).label(0) == 2).all()


def drawn_set(root: Path, names: dict[str, dict[str, tuple[int, int]]]) -> None:
    """images/<case>/ as DICOM series and labels/<case>.dcm as RTSTRUCT: structures are squares of rows and columns."""
    for case, structures in names.items():
        write_series(root / "images" / case, make_hu(0, (3, 24, 20)), series=case, patient=case)
        grid = read_volume(root / "images" / case).geometry
        squares = {
            name: [in_mm(grid, 1, [(low - 0.5, low - 0.5), (low - 0.5, high), (high, high), (high, low - 0.5)])]
            for name, (low, high) in structures.items()
        }
        rtstruct(root / "labels" / f"{case}.dcm", squares)


def test_pairs__rtstruct_beside_dicom_series(tmp_path, caplog):
    drawn_set(tmp_path, {"p1": {"Spleen": (10, 14), "liver": (2, 8)}, "p2": {"LIVER": (3, 6)}})
    data = open_dataset(tmp_path)
    assert data.labels.names == ("liver", "Spleen")
    check_grids(data)
    labels = {case.name: data.read_label(case, read_volume(case.images[0]).geometry) for case in data.cases}
    assert np.array_equal(np.unique(labels["p1"], return_counts=True)[1], [3 * 24 * 20 - 36 - 16, 36, 16])
    assert (labels["p2"] == 1).sum() == 9
    only = replace(data, labels=data.labels.only(["Spleen"]))
    grid = read_volume(only.cases[1].images[0]).geometry
    assert not only.read_label(only.cases[1], grid).any()
    assert "none of the labels Spleen is drawn" in caplog.text
    assert only.data_hash(only.cases) != data.data_hash(data.cases)


def test_pairs__structures_within_others_need_an_order(tmp_path, caplog):
    drawn_set(tmp_path, {"p1": {"body": (1, 18), "tumour": (5, 8)}})
    with pytest.raises(VolumeError, match=r"'body' and 'tumour' overlap in 9 of 9 voxels; write labels\.json"):
        check_grids(open_dataset(tmp_path))
    (tmp_path / "labels.json").write_text(json.dumps({"background": 0, "body": 1, "tumour": 7}))
    data = open_dataset(tmp_path)
    check_grids(data)
    assert caplog.text.count("'tumour' lies on top of 'body' in 9 voxels") == 1
    labels = data.read_label(data.cases[0], read_volume(data.cases[0].images[0]).geometry)
    assert (labels == 7).sum() == 9
    assert (labels == 1).sum() == 17 * 17 - 9


def test_pairs__a_label_folder_holds_one_file(tmp_path):
    drawn_set(tmp_path, {"p1": {"a": (1, 4)}})
    (tmp_path / "labels/p1").mkdir()
    (tmp_path / "labels/p1.dcm").rename(tmp_path / "labels/p1/RS.1.2.dcm")
    assert open_dataset(tmp_path).cases[0].label.name == "RS.1.2.dcm"
    (tmp_path / "labels/p1/second.dcm").touch()
    with pytest.raises(VolumeError, match="p1 holds 2 files"):
        open_dataset(tmp_path)


def test_pairs__two_files_of_one_name_are_refused(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "a.nii.gz", np.zeros((2, 3, 4), np.int16))
    save(tmp_path / "images" / "a.mha", np.zeros((2, 3, 4), np.int16))
    with pytest.raises(VolumeError, match=r"a\.mha and a\.nii\.gz in images/"):
        open_dataset(tmp_path)


def decathlon(root: Path, paths: list[str]) -> Path:
    for kind in ("imagesTr", "labelsTr"):
        for path in paths:
            (root / kind / path).parent.mkdir(parents=True, exist_ok=True)
            (root / kind / path).touch()
    training = [{"image": f"./imagesTr/{path}", "label": f"./labelsTr/{path}"} for path in paths]
    content = {"labels": {"0": "background", "1": "x"}, "modality": {"0": "CT"}, "training": training}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_msd__one_file_name_in_several_folders_is_a_case_each(tmp_path, caplog):
    data = open_dataset(decathlon(tmp_path, ["A/p1.nii.gz", "B/p1.nii.gz", "B/p2.nii.gz"]))
    assert [case.name for case in data.cases] == ["A_p1", "B_p1", "p2"]
    assert [case.patient for case in data.cases] == ["A_p1", "B_p1", "p2"]
    assert data.case("B_p1").images == (tmp_path / "imagesTr/B/p1.nii.gz",)
    assert "named <folder>_<file>" in caplog.text and "p1" in data.notes[0]


@pytest.mark.parametrize("paths", [["p1.nii.gz", "p1.nii.gz"], ["A/p1.nii.gz", "B/p1.nii.gz", "B/A_p1.nii.gz"]])
def test_open_dataset__two_cases_of_one_name_are_refused_with_both_paths(tmp_path, paths):
    with pytest.raises(ConfigError, match=r"two cases are named '.*p1': .*imagesTr.* and .*imagesTr"):
        open_dataset(decathlon(tmp_path, paths))


def test_open_dataset__a_name_that_leads_out_of_the_results_is_refused(tmp_path):
    volumes(tmp_path, ["a"])
    (tmp_path / "cases.csv").write_text("case,image,label\n../../a,imagesTr/a.nii.gz,labelsTr/a.nii.gz\n")
    with pytest.raises(ConfigError, match=r"'\.\./\.\./a' is no name of a file"):
        open_dataset(tmp_path)


def test_msd__two_values_of_one_name_are_refused(tmp_path):
    decathlon(tmp_path, ["a.nii.gz"])
    content = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "labels": {"0": "background", "1": "x", "2": "x"}}))
    with pytest.raises(ConfigError, match="several values the name 'x'"):
        open_dataset(tmp_path)


def test_nnunet__what_is_left_out_is_told(tmp_path, caplog):
    for name in ("imagesTr/a_0000", "imagesTr/b", "labelsTr/a", "labelsTr/b", "labelsTr/c"):
        (tmp_path / f"{name}.nii.gz").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    content = {"labels": {"background": 0, "x": 1}, "numTraining": 3}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    data = open_dataset(tmp_path)
    assert [case.name for case in data.cases] == ["a"]
    assert data.notes == (
        "imagesTr: 1 left out (not named <case>_0000.nii.gz): b.nii.gz",
        "labelsTr: 2 left out (label maps without an image): b.nii.gz, c.nii.gz",
        "dataset.json says numTraining 3, and there are 1 cases",
    )
    assert all(note in caplog.text for note in data.notes)


def test_msd__what_training_does_not_name_is_told(tmp_path):
    decathlon(tmp_path, ["a.nii.gz"])
    (tmp_path / "labelsTr/b.nii.gz").touch()
    content = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "numTraining": 2}))
    assert open_dataset(tmp_path).notes == (
        "dataset.json says numTraining 2, and there are 1 cases",
        "labelsTr: 1 left out (label maps that 'training' does not name): b.nii.gz",
    )


@pytest.mark.parametrize(("file", "column"), [("cases.csv", "Patient"), ("cases.csv", "PART"), ("patients.csv", "Site")])
def test_tables__a_column_in_other_capitals_is_refused(tmp_path, file, column):
    volumes(tmp_path, ["a"])
    more = {"cases.csv": "", "patients.csv": "", file: f",{column}"}
    row = "a,imagesTr/a.nii.gz,labelsTr/a.nii.gz"
    (tmp_path / "cases.csv").write_text(f"case,image,label{more['cases.csv']}\n{row}{',' if more['cases.csv'] else ''}\n")
    (tmp_path / "patients.csv").write_text(f"case,patient{more['patients.csv']}\na,p{',' if more['patients.csv'] else ''}\n")
    with pytest.raises(ConfigError, match=rf"{file}: the column '{column}' would not be read; write it '{column.lower()}'"):
        with_patients(open_dataset(tmp_path), None)


@pytest.mark.parametrize(
    ("labels", "order", "words"),
    [
        ({"x": 1, "y": 1}, None, r"'x' and 'y' are both \[1\]"),
        ({"x": [1, 2], "y": [2, 1]}, [1, 2], r"'x' and 'y' are both \[1, 2\]"),
        ({"x": 0}, None, "'background' and 'x' are both"),
        ({"x": [0, 1]}, [1], "holds 0, which is background"),
        ({"x": 1, "ignore": 1}, None, "'x' holds 1, which is \"ignore\""),
        ({"x": 1, "ignore": [2, 3]}, None, r'"ignore" is \[2, 3\]'),
        ({"x": 65537}, None, "label 'x' is 65537; .*at most 65535"),
        ({"whole": [1, 2], "core": 2}, [1, 1], "'whole' would be written as 1; expected a number of its own"),
        ({"whole": [1, 2], "core": 2}, [2, 1], r"'core' would be written as 1; .* among its values \[2\]"),
        ({"whole": [1, 2], "core": 2}, [True, 2], "need 'regions_class_order'"),
    ],
)
def test_labels__one_value_means_one_thing(labels, order, words):
    with pytest.raises(ConfigError, match=words):
        parse_labels({"background": 0, **labels}, order, "here")


def test_found_labels__a_value_that_is_too_large_is_refused(tmp_path):
    volumes(tmp_path, ["a"])
    save(tmp_path / "labelsTr/a.nii.gz", np.full((3, 8, 9), 70_000, dtype=np.int32))
    with pytest.raises(ConfigError, match="hold the value 70000; expected at most 65535"):
        open_dataset(tmp_path)


def test_prepare__label_values_beyond_int16_stay_what_they_are(tmp_path):
    volumes(tmp_path, ["a"], "_0000")
    values = np.full((3, 8, 9), 40_000, dtype=np.uint16)
    values[0] = 0
    save(tmp_path / "labelsTr/a.nii.gz", values)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "x": 40_000, "y": 2}}))
    data = open_dataset(tmp_path)
    for case in (
        prepare_case(data, data.cases[0], (0,), GridRule()),
        prepare_cached(data, data.cases[0], (0,), GridRule(), tmp_path / "cache"),
    ):
        assert [np.unique(case.label(z)).tolist() for z in range(3)] == [[0], [40_000], [40_000]]
        assert case.present[1] == {40_000}
