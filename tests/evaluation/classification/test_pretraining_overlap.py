"""The leak that must be impossible: evaluated images in the pretraining corpus, found on real CT through the real curation."""

import os
import sys

import pytest
from meddino_evaluation.classification.config import SplitConfig
from meddino_evaluation.classification.datasets import load_dataset_config, open_dataset
from meddino_evaluation.classification.evaluate import evaluate

from meddino.core.errors import ConfigError
from tests.processes import run as run_process


def test_evaluate__a_test_image_in_the_corpus_is_found(shared_data, backbone, quick, tmp_path):
    source = shared_data / "ct" / "tcga_luad" / "TCGA-92-8064"
    code = "import sys; from meddino_data_curation.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "build", str(source), "--out", str(tmp_path / "corpus")]
    own_home = os.environ | {"XDG_CONFIG_HOME": str(tmp_path)}  # the curation keeps its salt there
    run_process(words, check=True, timeout=120, env=own_home)
    dataset = open_dataset(load_dataset_config("ct_contrast"), shared_data)
    config = quick(protocols=("knn",), split=SplitConfig(repeats=1, corpus=str(tmp_path / "corpus")))
    with pytest.raises(ConfigError, match="TCGA-92-8064") as error:
        evaluate(backbone, dataset, config, tmp_path / "out")
    assert "seen (without labels) in pretraining" in str(error.value)
    assert "allow_pretraining_overlap" in str(error.value)
