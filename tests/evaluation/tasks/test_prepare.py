import json

import numpy as np
import pytest
from meddino_evaluation.data.dataset import check_grids
from meddino_evaluation.data.layouts import open_dataset
from meddino_evaluation.tasks.definition import LabelMapLayout, MaskSource, TaskDefinition, load_task
from meddino_evaluation.tasks.fake_data import LABEL_MAP_FAKES, make_fake
from meddino_evaluation.tasks.prepare import prepare_task
from PIL import Image

from meddino.core.errors import ConfigError, VolumeError

CASES = {"drive": 6, "jsrt": 2, "prostate_sites": 2}


@pytest.mark.parametrize("name", sorted(LABEL_MAP_FAKES))
def test_prepare_task__every_fake_copy_becomes_a_data_set_with_all_its_labels(name, tmp_path, fake_root):
    task = load_task(name)
    found = prepare_task(task, fake_root(name), tmp_path / "data")
    dataset = open_dataset(found.data)
    check_grids(dataset)
    assert len(dataset.all_cases) == CASES.get(name, 4)
    assert dataset.labels.names == task.labels
    assert dataset.modality == task.modality
    assert dataset.flat == (task.kind == "segmentation2d")
    case = dataset.cases[0]
    label = dataset.read_label(case, dataset.geometry(case))
    assert set(np.unique(label)) == set(range(len(task.labels) + 1))
    array, grid = dataset.read_images(case, range(len(dataset.channel_names)))
    assert array.shape == (len(dataset.channel_names), *grid.shape)
    # What the fake made brighter is where the labels are: images and masks were not mixed up or turned.
    assert array[0][label > 0].mean() > array[0][label == 0].mean() + 20


@pytest.mark.parametrize("name", ["kvasir_detection", "fgadr", "buid_boxes"])
def test_make_fake__tasks_of_other_kinds_have_one_too(name, tmp_path):
    make_fake(name, tmp_path, 2)
    assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_prepare_task__publishers_test_part_is_the_test(tmp_path, fake_root):
    dataset = open_dataset(prepare_task(load_task("drive"), fake_root("drive"), tmp_path / "data").data)
    assert [case.name for case in dataset.test_cases] == ["03", "06"]
    assert [case.name for case in dataset.cases] == ["01", "02", "04", "05"]


def test_prepare_task__several_masks_of_one_picture_are_put_together(tmp_path):
    make_fake("buid", tmp_path / "root", 2)
    dataset = open_dataset(prepare_task(load_task("buid"), tmp_path / "root", tmp_path / "data").data)
    masks = [
        np.asarray(Image.open(tmp_path / f"root/Dataset_BUSI_with_GT/benign/benign (1)_mask{end}.png")) for end in ("", "_1")
    ]
    case = dataset.case("benign_1_")
    np.testing.assert_array_equal(dataset.read_label(case, dataset.geometry(case))[0] > 0, (masks[0] > 0) | (masks[1] > 0))


def test_prepare_task__other_sites_are_test_sets_of_their_own(tmp_path, fake_root):
    found = prepare_task(load_task("prostate_sites"), fake_root("prostate_sites"), tmp_path / "data")
    assert sorted(found.tests) == ["BIDMC", "HK", "RUNMC"]
    assert {case.site for case in open_dataset(found.data).cases} == {"BMC"}
    assert {case.site for case in open_dataset(found.tests["HK"]).cases} == {"HK"}
    assert "data.modality=mr" in found.overrides


def test_prepare_task__again_writes_nothing_until_a_file_changes(tmp_path):
    make_fake("isic2018", tmp_path / "root", 2)
    task, out = load_task("isic2018"), tmp_path / "data"
    prepare_task(task, tmp_path / "root", out)
    before = (out / "cases.csv").stat().st_mtime_ns
    prepare_task(task, tmp_path / "root", out)
    assert (out / "cases.csv").stat().st_mtime_ns == before
    make_fake("isic2018", tmp_path / "root", 3)
    prepare_task(task, tmp_path / "root", out)
    assert len(open_dataset(out).cases) == 3


def picture_task(**layout) -> TaskDefinition:
    values = {"images": {"grey": "{case}.png"}, "masks": (MaskSource(path="{case}_mask.png", label="a"),), "exclude": "_mask"}
    facts = dict.fromkeys(("title", "citation", "licence", "where", "split_rule"), "-")
    layout = LabelMapLayout(**{**values, **layout})
    labels = tuple(dict.fromkeys(one for mask in layout.masks for one in ([mask.label] if mask.label else mask.values)))
    return TaskDefinition(name="own", kind="segmentation2d", labels=labels, layout=layout, **facts)


def save(path, values, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8), mode).save(path)


GREY = np.arange(64).reshape(8, 8)
HALF = 255 * (np.arange(64).reshape(8, 8) < 32)


def test_prepare_task__a_mask_of_another_size_is_named(tmp_path):
    save(tmp_path / "one.png", GREY)
    save(tmp_path / "one_mask.png", HALF[:4])
    with pytest.raises(VolumeError, match=r"case one: mask one_mask\.png has 1 x 4 x 8 pixels, its image 1 x 8 x 8"):
        prepare_task(picture_task(), tmp_path, tmp_path / "out")


def test_prepare_task__a_missing_mask_and_a_missing_channel_are_named(tmp_path):
    save(tmp_path / "one.png", GREY)
    with pytest.raises(ConfigError, match="without a mask: one"):
        prepare_task(picture_task(), tmp_path, tmp_path / "out")
    save(tmp_path / "one_mask.png", HALF)
    with pytest.raises(ConfigError, match=r"case one has no one_b\.png"):
        prepare_task(picture_task(images={"a": "{case}.png", "b": "{case}_b.png"}), tmp_path, tmp_path / "out")


def test_prepare_task__a_label_that_no_mask_holds_is_told(tmp_path, caplog):
    save(tmp_path / "one.png", GREY)
    save(tmp_path / "one_mask.png", HALF // 255)
    mask = MaskSource(path="{case}_mask.png", values={"a": (1,), "b": (2,)})
    prepare_task(picture_task(masks=(mask,)), tmp_path, tmp_path / "out")
    assert "no mask holds the labels ['b']" in caplog.text


def test_prepare_task__unknown_values_of_a_mask_are_named(tmp_path):
    save(tmp_path / "one.png", GREY)
    save(tmp_path / "one_mask.png", HALF)
    with pytest.raises(VolumeError, match=r"one_mask\.png holds the values \[255\]; known: \[1\]"):
        prepare_task(picture_task(masks=(MaskSource(path="{case}_mask.png", values={"a": (1,)}),)), tmp_path, tmp_path / "out")


def test_prepare_task__arrays_of_npz_files_become_pictures(tmp_path):
    np.savez(tmp_path / "one.npz", image=GREY.astype(np.float32), mask=(HALF > 0).astype(np.uint8))
    mask = MaskSource(path="{case}.npz#mask", values={"a": (1,)})
    task = picture_task(images={"grey": "{case}.npz#image"}, masks=(mask,))
    dataset = open_dataset(prepare_task(task, tmp_path, tmp_path / "out").data)
    case = dataset.cases[0]
    array, grid = dataset.read_images(case, (0,))
    assert array.dtype == np.uint16 and array.max() == 65535
    np.testing.assert_array_equal(dataset.read_label(case, grid)[0] == 1, HALF > 0)


def test_open_dataset__pictures_beside_masks(tmp_path):
    save(tmp_path / "images/one.png", GREY)
    save(tmp_path / "masks/one.png", HALF)
    save(tmp_path / "images/two.jpg", np.stack([GREY * 3] * 3, -1), "RGB")
    save(tmp_path / "masks/two.png", HALF)
    dataset = open_dataset(tmp_path)
    assert dataset.flat and dataset.modality == "image" and dataset.channel_names == ("red", "green", "blue")
    assert dataset.read_images(dataset.case("one"), (0, 1, 2))[0].shape == (3, 1, 8, 8)


def test_open_dataset__pictures_among_volumes_and_mixed_modalities_are_refused(tmp_path):
    save(tmp_path / "one.png", GREY)
    (tmp_path / "two.nii.gz").write_bytes(b"")
    (tmp_path / "labels.json").write_text(json.dumps({"background": 0, "a": 1}))
    (tmp_path / "cases.csv").write_text("case,image,label\none,one.png,one.png\ntwo,two.nii.gz,one.png\n")
    with pytest.raises(ConfigError, match=r"mixes pictures \(case one: one\.png\) and volumes \(case two: two\.nii\.gz\)"):
        open_dataset(tmp_path)
    (tmp_path / "cases.csv").write_text("case,image,label,modality\none,one.png,one.png,image\ntwo,one.png,one.png,mr\n")
    with pytest.raises(ConfigError, match=r"image \(case one\), mr \(case two\)"):
        open_dataset(tmp_path)


def test_read_images__an_empty_picture_and_a_lossy_mask_are_named(tmp_path):
    save(tmp_path / "images/one.png", np.zeros((8, 8)))
    save(tmp_path / "masks/one.jpg", HALF)
    with pytest.raises(VolumeError, match=r"masks/one\.jpg is a JPEG"):
        open_dataset(tmp_path)
    (tmp_path / "masks/one.jpg").unlink()
    save(tmp_path / "masks/one.png", HALF)
    dataset = open_dataset(tmp_path)
    with pytest.raises(VolumeError, match=r"one\.png is empty: every pixel is 0"):
        dataset.read_images(dataset.cases[0], (0,))
