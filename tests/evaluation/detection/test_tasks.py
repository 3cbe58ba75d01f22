import json

import numpy as np
import pytest
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.detection.command import run_task
from meddino_evaluation.detection.config import DataConfig
from meddino_evaluation.detection.dataset import Pictures, open_detection
from meddino_evaluation.detection.fake_data import FAKES
from meddino_evaluation.tasks.definition import load_task

from meddino.core.errors import ConfigError
from tests.evaluation.detection.conftest import QUICK


@pytest.fixture(scope="module")
def vindr(tmp_path_factory):
    root = tmp_path_factory.mktemp("vindr")
    for number in range(20):
        FAKES["vindr_cxr"](root, number, np.random.default_rng(number))
    return root


def test_vindr__three_readers_of_a_radiograph_become_one_and_the_publishers_test_stays(vindr):
    dataset = open_detection("vindr_cxr", vindr, DataConfig())
    assert len(dataset.cases) == 20
    assert {case.split for case in dataset.cases} == {"train", "test"}
    assert dataset.classes == ("Cardiomegaly", "Nodule/Mass")
    assert {len(case.boxes) for case in dataset.cases} == {0, 1}
    assert not dataset.has_patients
    assert "pretraining list" in dataset.notes[-1]
    Pictures(load_backbone("random:vitnano8"), dataset, DataConfig(image_size_px=64)).check(dataset.cases)


def test_vindr__smoke(vindr, tmp_path):
    task = load_task("vindr_cxr")
    run_task(task, "random:vitnano8", vindr, tmp_path, [*QUICK, "detector.name=retinanet"])
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["headline"]["metric"] == task.metric
    assert content["splits"][0].startswith("repeat 0: publishers' split, validation held out from train")
    assert content["data"]["licence"].startswith("PhysioNet")


def test_open_detection__a_task_needs_its_root_and_its_kind(vindr):
    with pytest.raises(ConfigError, match="--root"):
        open_detection("vindr_cxr", None, DataConfig())
    with pytest.raises(ConfigError, match="is no detection"):
        open_detection("isic2018", vindr, DataConfig())
