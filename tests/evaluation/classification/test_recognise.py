import numpy as np
import pytest
from meddino_evaluation.backbones.load import load_backbone, model_name, named_model
from meddino_evaluation.classification.dataset_config import DatasetConfig
from meddino_evaluation.classification.datasets import load_dataset_config, open_dataset
from meddino_evaluation.classification.fake_data import make_fake
from meddino_evaluation.classification.recognise import open_labelled, recognise
from meddino_evaluation.cli import main
from PIL import Image

from meddino.core.config import check_config
from meddino.core.errors import ConfigError


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.arange(64).reshape(8, 8) + value).astype(np.uint8)).save(path)


def test_class_folders__with_and_without_the_publishers_parts(tmp_path):
    for name in ("cat", "dog"):
        for number in range(3):
            picture(tmp_path / "plain" / name / f"{number}.png")
            picture(tmp_path / "parted" / ("train", "valid", "test")[number] / name / "0.png")
    (tmp_path / "plain" / "cat" / ".DS_Store").write_bytes(b"junk")
    plain = open_labelled(str(tmp_path / "plain"), None)
    assert (plain.kind, plain.config.classes, plain.config.modality) == ("binary", ("cat", "dog"), "image")
    assert [case.label for case in plain.cases] == [0, 0, 0, 1, 1, 1]
    parted = open_labelled(str(tmp_path / "parted"), None)
    assert sorted(case.split for case in parted.cases) == ["test", "test", "train", "train", "val", "val"]


def test_table__image_label_patient_and_split(tmp_path):
    rows = ["image,label,patient,split"]
    for number in range(6):
        picture(tmp_path / "files" / f"{number}.png")
        rows.append(f"files/{number}.png,{'abc'[number % 3]},p{number // 2},{'training' if number < 4 else 'test'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    for data in (tmp_path, tmp_path / "labels.csv"):
        found = open_labelled(str(data), None)
        assert (found.kind, found.has_patients) == ("multiclass", True)
        assert [case.patient for case in found.cases] == ["p0", "p0", "p1", "p1", "p2", "p2"]
        assert [case.split for case in found.cases] == ["train"] * 4 + ["test"] * 2
    (tmp_path / "labels.csv").write_text("image,label,split\nfiles/0.png,a,tomorrow\n")
    with pytest.raises(ConfigError, match="tomorrow"):
        recognise(tmp_path / "labels.csv")


@pytest.mark.parametrize(("first", "second"), [("0", "0.0"), ("Normal", "normal")])
def test_labels__that_differ_in_writing_alone_are_refused(tmp_path, first, second):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "labels.csv").write_text(f"image,label\na.png,{first}\nb.png,{second}\n")
    with pytest.raises(ConfigError, match=f"'{first}' and '{second}' differ in writing alone"):
        open_labelled(str(tmp_path), None)


def test_ct_volumes__are_taken_for_hounsfield_units(tmp_path):
    make_fake("ct_contrast", tmp_path / "fake", 2)
    table = tmp_path / "fake/classification/ct_contrast/labels.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    own = tmp_path / "own.csv"
    own.write_text("\n".join(["image,label,patient", *(f"fake/{path},{label},{who}" for path, who, label in rows)]))
    assert recognise(own)[0].modality == "ct"


def test_nothing_to_recognise__says_what_is_expected(tmp_path):
    (tmp_path / "only").mkdir()
    with pytest.raises(ConfigError, match=r"'only'"):
        open_labelled(str(tmp_path), None)
    with pytest.raises(ConfigError, match="--root"):
        open_labelled("brain_mri", None)
    with pytest.raises(ConfigError, match=r"missing\.csv"):
        open_labelled(str(tmp_path / "missing.csv"), None)
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.nii.gz").touch()
    with pytest.raises(ConfigError, match=r"label maps.*meddino-eval segment"):
        open_labelled(str(tmp_path / "set"), None)


def test_minimal_definition__name_task_classes_layout(tmp_path):
    layout = {"kind": "files", "pattern": "*/*.png", "label_regex": "^([^/]+)/"}
    config = check_config(DatasetConfig, {"name": "own", "task": "binary", "classes": ["a", "b"], "layout": layout}, "test")
    assert config.licence == "not stated"


def test_datasets_init__writes_a_definition_that_opens(tmp_path, capsys):
    for name in ("cat", "dog"):
        picture(tmp_path / "data" / name / "0.png")
    out = tmp_path / "own.yaml"
    assert main(["datasets", "init", str(tmp_path / "data"), "--out", str(out)]) == 0
    assert "cat, dog" in capsys.readouterr().out
    assert len(open_dataset(load_dataset_config(str(out)), tmp_path / "data").cases) == 2
    out.write_text(out.read_text() + "# completed by hand\n")
    assert main(["datasets", "init", str(tmp_path / "data"), "--out", str(out)]) == 2
    assert "own.yaml is there already" in capsys.readouterr().err and out.read_text().endswith("# completed by hand\n")
    assert main(["datasets", "init", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new.yaml")]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err


def test_named_models__name_and_model(tmp_path):
    assert named_model("ours=random:vitnano8") == ("ours", "random:vitnano8")
    assert named_model("random:vitnano8") == ("random:vitnano8", "random:vitnano8")
    assert [model_name(one) for one in ("ours=random:vitnano8", "random:a/b/model", "runs/model")] == [
        "ours",
        "random:model",
        "model",
    ]
    backbone = load_backbone("ours=random:vitnano8")
    assert (backbone.name, backbone.spec) == ("ours", "random:vitnano8")
    with pytest.raises(ConfigError, match="random:vitb16 runs it"):
        load_backbone("vitb16")


@pytest.mark.parametrize("column", ["Patient", "SPLIT"])
def test_table__a_column_in_other_capitals_is_refused(tmp_path, column):
    picture(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_text(f"image,label,{column}\n0.png,a,train\n")
    with pytest.raises(ConfigError, match=rf"the column '{column}' would not be read; write it '{column.lower()}'"):
        recognise(tmp_path)
