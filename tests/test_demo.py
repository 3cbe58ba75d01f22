"""What the demo chooses to read, before any of its commands runs."""

import json

import pytest

from meddino.core.errors import MedDINOError
from meddino.demo import make_plan


@pytest.fixture
def data(tmp_path):
    """A folder with labelled sets: two of CT, one of MR with the highest number."""
    for name, channels in (("Dataset001_A", ["CT"]), ("Dataset002_B", ["CT"]), ("Dataset003_M", ["T1"])):
        for images in ("imagesTr", "labelsTr"):
            (tmp_path / "segmentation" / name / images).mkdir(parents=True)
        text = json.dumps({"channel_names": dict(enumerate(channels)), "labels": {"background": 0, "a": 1}})
        (tmp_path / "segmentation" / name / "dataset.json").write_text(text)
    return tmp_path


def test_make_plan__takes_the_last_set_of_ct_and_says_what_becomes_of_the_others(data, tmp_path):
    plan = make_plan(data, tmp_path / "out", seed=0)
    assert plan.dataset.name == "Dataset002_B"
    assert [word.rpartition("segmentation/")[2] for word in plan.held_out() if word != "--exclude"] == [
        "Dataset002_B/imagesTr",
        "Dataset001_A/imagesTr",
    ]
    said = "\n".join(plan.told())
    assert all(part in said for part in ("Dataset002_B is segmented", "Dataset001_A stays out", "Dataset003_M (T1)"))


def test_make_plan__where_no_name_says_ct_the_last_is_taken(data, tmp_path):
    for name in ("Dataset001_A", "Dataset002_B"):
        file = data / "segmentation" / name / "dataset.json"
        file.write_text(file.read_text().replace("CT", "T2"))
    assert make_plan(data, tmp_path / "out", seed=0).dataset.name == "Dataset003_M"


def test_make_plan__a_broken_dataset_is_refused_before_anything_is_trained(data, tmp_path):
    file = data / "segmentation" / "Dataset001_A" / "dataset.json"
    file.write_text("{}")
    with pytest.raises(MedDINOError, match=str(file)):
        make_plan(data, tmp_path / "out", seed=0)
