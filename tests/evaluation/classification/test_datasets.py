import pytest
from meddino_evaluation.classification.datasets import load_dataset_config, natural_key, open_dataset
from meddino_evaluation.classification.datasets_command import prepare_segmentation
from meddino_evaluation.classification.fake_data import FAKES, make_fake
from meddino_evaluation.classification.images import read_slices

from meddino.core.config import shipped_configs
from meddino.core.errors import ConfigError

SHIPPED = sorted(path.stem for path in (shipped_configs() / "evaluation" / "datasets").glob("*.yaml"))


def test_shipped__every_definition_has_a_fake_and_the_reverse():
    assert sorted(FAKES) == SHIPPED
    for name in SHIPPED:
        config = load_dataset_config(name)
        assert config.name == name
        assert config.citation
        assert config.licence
        assert config.split_rule


@pytest.mark.parametrize("name", SHIPPED)
def test_open_dataset__the_fake_copy_in_its_real_layout(fake_set, tmp_path, name):
    config = load_dataset_config(name)
    if config.task == "segmentation":
        make_fake(name, tmp_path / "raw", 3)
        assert prepare_segmentation(config, tmp_path / "raw", tmp_path / "nnunet") == 3
        assert len(list((tmp_path / "nnunet" / "imagesTr").glob("*_0000.nii.gz"))) == 3
        return
    dataset = fake_set(name)
    assert dataset.cases
    assert len({case.name for case in dataset.cases}) == len(dataset.cases)
    for case in dataset.cases[:3]:
        stack = read_slices(case.source, config.modality)
        assert stack.values.ndim == 4
        assert (len(stack.values) > 1) == config.volume
    if config.task == "multilabel":
        assert {len(case.label) for case in dataset.cases} == {len(config.classes)}
    else:
        assert {case.label for case in dataset.cases} == set(range(len(config.classes)))


def test_open_dataset__labels_and_patients_are_what_the_layout_says(fake_set):
    nih = {case.name: case for case in fake_set("nih_chestxray14").cases}
    assert nih["00000001_000.png"].label == (0,) * 14
    assert nih["00000001_000.png"].patient == "1"
    assert nih["00000003_000.png"].label[1] == 1
    chexpert = fake_set("chexpert").cases
    assert any(-1 in case.label for case in chexpert if case.split == "train")
    assert chexpert[0].patient == "patient00000"
    tumour = {case.patient for case in fake_set("brain_tumor").cases}
    assert "100000" in tumour
    assert fake_set("ham10000").cases[0].patient.startswith("HAM_")
    assert {case.patient for case in fake_set("brain_mri").cases} >= {"0-0", "1-0", "2-2"}


def test_open_dataset__ids_without_an_image_are_named(tmp_path):
    make_fake("aptos2019", tmp_path, 2)
    with (tmp_path / "train.csv").open("a") as stream:
        stream.write("ghost,1\n")
    with pytest.raises(ConfigError, match="ids without an image: ghost"):
        open_dataset(load_dataset_config("aptos2019"), tmp_path)


def test_open_dataset__a_split_list_with_unknown_ids_is_named(tmp_path):
    make_fake("nih_chestxray14", tmp_path, 1)
    with (tmp_path / "test_list.txt").open("a") as stream:
        stream.write("99999999_000.png\n")
    with pytest.raises(ConfigError, match=r"ids that no table has: 99999999_000\.png"):
        open_dataset(load_dataset_config("nih_chestxray14"), tmp_path)


def test_open_dataset__unknown_label_and_missing_column(tmp_path):
    make_fake("ham10000", tmp_path, 1)
    table = tmp_path / "HAM10000_metadata.csv"
    text = table.read_text()
    table.write_text(text.replace(",mel,", ",melanoma,"))
    with pytest.raises(ConfigError, match="unknown label 'melanoma'"):
        open_dataset(load_dataset_config("ham10000"), tmp_path)
    table.write_text(text.replace("lesion_id", "lesion"))
    with pytest.raises(ConfigError, match="lacks the column lesion_id"):
        open_dataset(load_dataset_config("ham10000"), tmp_path)


def test_open_dataset__missing_and_empty_folder(tmp_path):
    with pytest.raises(ConfigError, match="get the data from https://"):
        open_dataset(load_dataset_config("brain_mri"), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nothing found"):
        open_dataset(load_dataset_config("brain_mri"), tmp_path)
    with pytest.raises(ConfigError, match="no table"):
        open_dataset(load_dataset_config("aptos2019"), tmp_path)


def test_natural_key__counts_as_people_do():
    assert sorted(["a10", "a2", "b1", "a1"], key=natural_key) == ["a1", "a2", "a10", "b1"]


def test_real_data__every_classification_set_opens(shared_data):
    expected = {"ct_contrast": (shared_data, 69, 36), "ct_plane": (shared_data / "classification/ct_plane", 36, 6)}
    expected["brain_mri"] = (shared_data / "classification/brain_mri", 240, 60)
    expected["pneumoniamnist"] = (shared_data / "classification/pneumoniamnist", 524, 524)
    for name, (root, cases, patients) in expected.items():
        dataset = open_dataset(load_dataset_config(name), root)
        assert len(dataset.cases) == cases
        assert len({case.patient for case in dataset.cases}) == patients
