import pytest
from meddino_evaluation.classification.evaluate import evaluate
from meddino_evaluation.classification.retrieval import retrieve
from meddino_evaluation.data.run_folder import refuse_files_of_others, write_settings
from meddino_evaluation.metrics.score_command import ScoreConfig, score_folders
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.dense_probe.config import ProbeConfig
from meddino_evaluation.segmentation.dense_probe.run import run_probe
from meddino_evaluation.segmentation.report import _noted
from meddino_evaluation.segmentation.run import segment

from meddino.core.config import load_config
from meddino.core.errors import ConfigError


def test_refuse_files_of_others__only_where_no_run_was_begun(tmp_path):
    names = ("report.html", "metrics.json")
    refuse_files_of_others(tmp_path / "new", names)
    (tmp_path / "notes.txt").touch()
    refuse_files_of_others(tmp_path, names)
    (tmp_path / "report.html").touch()
    with pytest.raises(ConfigError, match=r"holds 'report\.html', and no run was begun there"):
        refuse_files_of_others(tmp_path, names)
    (tmp_path / "report.html").unlink()
    write_settings(tmp_path, SegmentConfig())
    (tmp_path / "report.html").touch()
    refuse_files_of_others(tmp_path, names)
    assert load_config(SegmentConfig, [tmp_path / "config.yaml"]) == SegmentConfig()


def test_refuse_files_of_others__a_config_that_the_user_wrote(tmp_path):
    (tmp_path / "config.yaml").write_text("seeds: [0]  # mine\n")
    with pytest.raises(ConfigError, match=r"holds 'config\.yaml'"):
        refuse_files_of_others(tmp_path, ())


def test_score__leaves_files_of_others_as_they_are(tmp_path):
    (tmp_path / "cases.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'cases\.csv'"):
        score_folders(tmp_path, tmp_path, tmp_path, ScoreConfig())


def test_probe__leaves_files_of_others_as_they_are(tmp_path):
    (tmp_path / "metrics.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'metrics\.json'"):
        run_probe(ProbeConfig(), {}, tmp_path, tmp_path)


@pytest.mark.parametrize("protocol", [evaluate, retrieve])
def test_classification__leaves_files_of_others_as_they_are(protocol, fake_set, backbone, quick, tmp_path):
    (tmp_path / "per_case.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'per_case\.csv'"):
        protocol(backbone, fake_set("ct_contrast"), quick(), tmp_path)


def test_segment__does_not_write_over_the_data_sets_own_table(tmp_path):
    (tmp_path / "cases.csv").write_text("case,image,label\n")
    with pytest.raises(ConfigError, match=r"holds 'cases\.csv'"):
        segment(SegmentConfig(), "none", tmp_path, tmp_path)


def test_report__notes_of_the_data_are_told():
    assert "Of the data: 2 left out." in str(_noted(["2 left out"])) and not _noted([])
