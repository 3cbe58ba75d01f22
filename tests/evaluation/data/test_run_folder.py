import pytest
from meddino_evaluation.data.run_folder import refuse_files_of_others
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.report import _noted
from meddino_evaluation.segmentation.run import segment

from meddino.core.errors import ConfigError


def test_refuse_files_of_others__only_where_no_run_was_begun(tmp_path):
    names = ("report.html", "metrics.json")
    refuse_files_of_others(tmp_path / "new", names, "config.yaml")
    (tmp_path / "notes.txt").touch()
    refuse_files_of_others(tmp_path, names, "config.yaml")
    (tmp_path / "report.html").touch()
    with pytest.raises(ConfigError, match=r"holds 'report\.html', and no run was begun there"):
        refuse_files_of_others(tmp_path, names, "config.yaml")
    (tmp_path / "config.yaml").touch()
    refuse_files_of_others(tmp_path, names, "config.yaml")


def test_segment__does_not_write_over_the_data_sets_own_table(tmp_path):
    (tmp_path / "cases.csv").write_text("case,image,label\n")
    with pytest.raises(ConfigError, match=r"holds 'cases\.csv'"):
        segment(SegmentConfig(), "none", tmp_path, tmp_path)


def test_report__notes_of_the_data_are_told():
    assert "Of the data: 2 left out." in str(_noted(["2 left out"])) and not _noted([])
