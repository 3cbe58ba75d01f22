import json

import numpy as np
import pytest
from meddino_evaluation.detection.config import DataConfig
from meddino_evaluation.detection.dataset import open_detection
from meddino_evaluation.detection.layouts import BoxTableLayout
from meddino_evaluation.detection.readers import merge_readers, read_boxes, read_coco, read_voc
from PIL import Image

from meddino.core.errors import ConfigError
from tests.evaluation.detection.conftest import squares, write_table

VOC = """<?xml version="1.0"?>
<annotation><filename>0.png</filename><size><width>64</width><height>64</height><depth>1</depth></size>
<object><name>grey</name><bndbox><xmin>1</xmin><ymin>3</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object></annotation>"""


def rows(*boxes, image="0.png"):
    return [{"image": image, "x1": a, "y1": b, "x2": c, "y2": d, "label": label, "patient": "p"} for a, b, c, d, label in boxes]


def test_table__rows_become_images_and_an_empty_row_an_image_without_a_box(table_set):
    cases, declared = read_boxes(BoxTableLayout(tables={"boxes.csv": None}), table_set)
    assert declared is None
    assert len(cases) == 20
    assert sum(not len(case.boxes) for case in cases) == 4
    assert cases[3].patient == "p1"
    assert cases[0].boxes.tolist() == [list(map(float, squares(0)[1][0][:4]))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((1, 2, 1, 9, "grey"), "no width.*line 2"),
        ((1, 2, 8, "x", "grey"), "line 2.*'x' is no number"),
        ((1, 2, 8, "", "grey"), "line 2: a box needs"),
        ((1, 2, 8, 9, ""), "line 2: a box needs"),
        ((1, 2, "nan", 9, "grey"), "line 2.*'nan'"),
    ],
)
def test_table__a_box_that_is_none_is_named(tmp_path, row, message):
    Image.fromarray(squares(0)[0]).save(tmp_path / "0.png")
    write_table(tmp_path / "boxes.csv", rows(row))
    with pytest.raises(ConfigError, match="(?s)" + message):
        read_boxes(BoxTableLayout(tables={"boxes.csv": None}), tmp_path)


def test_table__missing_images_and_two_patients_of_one_image_are_named(tmp_path):
    write_table(tmp_path / "boxes.csv", rows((1, 2, 8, 9, "grey"), image="gone.png"))
    with pytest.raises(ConfigError, match=r"gone\.png"):
        read_boxes(BoxTableLayout(tables={"boxes.csv": None}), tmp_path)
    first, second = rows((1, 2, 8, 9, "grey"), (2, 2, 8, 9, "grey"))
    write_table(tmp_path / "boxes.csv", [first, second | {"patient": "q"}])
    with pytest.raises(ConfigError, match=r"line 3.*another patient"):
        read_boxes(BoxTableLayout(tables={"boxes.csv": None}), tmp_path)


def test_merge_readers__overlapping_boxes_of_a_class_become_their_mean(tmp_path):
    Image.fromarray(squares(0)[0]).save(tmp_path / "0.png")
    write_table(
        tmp_path / "boxes.csv",
        rows((0, 0, 20, 20, "grey"), (2, 0, 22, 20, "grey"), (0, 0, 20, 20, "bright"), (40, 40, 50, 50, "grey")),
    )
    (case,), _ = read_boxes(BoxTableLayout(tables={"boxes.csv": None}), tmp_path)
    merged = merge_readers(case, 0.5)
    assert merged.boxes.tolist() == [[1, 0, 21, 20], [0, 0, 20, 20], [40, 40, 50, 50]]
    assert merged.names == ("grey", "bright", "grey")


def test_coco__boxes_classes_and_patients(coco):
    path = coco()
    cases, classes = read_coco(path, path.parent)
    assert classes == ("bright", "grey")  # in the order of their ids
    assert cases[1].boxes.tolist() == [[5.5, 6, 15.5, 26]]
    assert cases[1].patient == "p1"
    assert not len(cases[2].boxes)
    assert cases[0].size_px == (64, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": 1, "file_name": "0.png"}, {"id": 1, "file_name": "1.png"}]}, "images repeat the ids 1"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "categories repeat the ids 3"),
        ({"annotations": [{"id": 5}, {"id": 5}]}, "annotations repeat the ids 5"),
        ({"annotations": [{"id": 5, "image_id": 99}]}, "annotation 5: image_id 99"),
        ({"annotations": [{"id": 5, "image_id": 0, "category_id": 99}]}, "annotation 5: category_id 99"),
        ({"annotations": [{"id": 5, "image_id": 0, "category_id": 3, "bbox": [1, 2, 3]}]}, "annotation 5: bbox"),
        (
            {"annotations": [{"id": 5, "image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1}]},
            "annotation 5 is a crowd",
        ),
        ({"images": [{"id": 1, "file_name": "../secret.png"}]}, "no path below"),
        ({"images": [{"id": 1, "file_name": "/etc/passwd"}]}, "no path below"),
        ({"images": "many"}, "'images' is no list"),
        ({"images": [{"id": [1], "file_name": "0.png"}]}, "no number or text"),
    ],
)
def test_coco__what_is_wrong_is_named(coco, changes, message):
    path = coco(**changes)
    with pytest.raises(ConfigError, match=message):
        read_coco(path, path.parent)


def test_coco__no_json_and_endless_nesting_are_one_line(tmp_path):
    for text in ("{", "[" * 100_000, "[1]"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ConfigError, match=r"a\.json"):
            read_coco(tmp_path / "a.json", tmp_path)


def test_voc__corners_count_from_one(tmp_path):
    (tmp_path / "0.xml").write_text(VOC)
    case = read_voc(tmp_path / "0.xml", tmp_path)
    assert case.boxes.tolist() == [[0, 2, 10, 20]]
    assert case.names == ("grey",)
    assert case.size_px == (64, 64)


def test_voc__entity_bombs_broken_and_foreign_files_are_refused(tmp_path):
    bomb = (
        '<!DOCTYPE lolz [<!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;">]><annotation><filename>&lol2;</filename></annotation>'
    )
    outside = VOC.replace("0.png", "../0.png")
    for text, message in (
        (bomb, "document type"),
        (bomb.encode("utf-16"), "document type"),
        ("<a>", "no XML"),
        (outside, "no path"),
    ):
        path = tmp_path / "a.xml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError, match=message):
            read_voc(path, tmp_path)
    (tmp_path / "a.xml").write_text(VOC.replace("<xmin>1</xmin>", ""))
    with pytest.raises(ConfigError, match="object 1: '' is no number"):
        read_voc(tmp_path / "a.xml", tmp_path)


def test_open_detection__finds_each_layout_by_its_files(table_set, coco, tmp_path):
    assert len(open_detection(str(table_set), None, DataConfig()).cases) == 20
    assert open_detection(str(table_set / "boxes.csv"), None, DataConfig()).classes == ("bright", "grey")
    assert open_detection(str(coco().parent), None, DataConfig()).classes == ("bright", "grey")
    voc = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    for number, part in enumerate(("train", "val", "test")):
        Image.fromarray(squares(number)[0]).save(voc / f"JPEGImages/{number}.png")
        (voc / f"Annotations/{number}.xml").write_text(VOC.replace("0.png", f"{number}.png"))
        (voc / f"ImageSets/Main/{part}.txt").write_text(f"{number}\n")
    assert [case.split for case in open_detection(str(voc), None, DataConfig()).cases] == ["train", "val", "test"]
    kvasir = tmp_path / "kvasir"
    (kvasir / "images").mkdir(parents=True)
    Image.fromarray(squares(0)[0]).save(kvasir / "images/a.jpg")
    box = {"label": "polyp", "xmin": 1, "ymin": 2, "xmax": 30, "ymax": 40}
    (kvasir / "kavsir_bboxes.json").write_text(json.dumps({"a": {"height": 64, "width": 64, "bbox": [box]}}))
    assert np.array_equal(open_detection(str(kvasir), None, DataConfig()).cases[0].boxes, [[1, 2, 30, 40]])
    with pytest.raises(ConfigError, match="no detection set"):
        open_detection(str(kvasir / "images"), None, DataConfig())


def test_open_detection__a_box_that_stands_there_twice_counts_once_and_is_told(tmp_path):
    Image.fromarray(squares(0)[0]).save(tmp_path / "0.png")
    write_table(tmp_path / "boxes.csv", rows((1, 2, 8, 9, "grey"), (1, 2, 8, 9, "white"), (1, 2, 8, 9, "grey")))
    dataset = open_detection(str(tmp_path), None, DataConfig())
    assert dataset.cases[0].names == ("grey", "white") and len(dataset.cases[0].boxes) == 2
    assert "1 boxes stand there more than once and count once" in dataset.notes[0] and "line 4" in dataset.notes[0]


def test_open_detection__a_class_that_never_occurs_is_named_and_can_be_left_out(coco):
    path = coco(annotations=[{"id": 1, "image_id": 0, "category_id": 7, "bbox": [1, 2, 10, 20]}])
    with pytest.raises(ConfigError, match=r"class bright occurs.*data\.classes=\[grey\]"):
        open_detection(str(path), None, DataConfig())
    assert open_detection(str(path), None, DataConfig(classes=("grey",))).classes == ("grey",)
    both = open_detection(str(coco()), None, DataConfig(classes=("grey",)))
    assert "bright are left out" in both.notes[0]
    assert [len(case.boxes) for case in both.cases] == [1, 0, 0]


@pytest.mark.parametrize("column", ["Patient", "Split"])
def test_table__a_column_in_other_capitals_is_refused(tmp_path, column):
    (tmp_path / "boxes.csv").write_text(f"image,x1,y1,x2,y2,label,{column}\n0.png,1,1,2,2,a,train\n")
    with pytest.raises(ConfigError, match=rf"the column '{column}' would not be read; write it '{column.lower()}'"):
        read_boxes(BoxTableLayout(tables={"boxes.csv": None}), tmp_path)


def test_open_detection__boxes_as_shares_of_the_picture_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "0.png")
    write_table(tmp_path / "boxes.csv", rows((0.1, 0.2, 0.5, 1, "a")))
    with pytest.raises(ConfigError, match=r"every box lies between 0 and 1.*boxes are in pixels"):
        open_detection(str(tmp_path / "boxes.csv"), None, DataConfig())
