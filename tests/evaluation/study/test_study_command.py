import csv
import json
import shutil

import pytest
from meddino_evaluation.cli import main
from meddino_evaluation.study.config import StudyConfig, StudyData, table_names

from meddino.core.errors import ConfigError

QUICK = [
    *("evaluation.features.image_size_px=32", "evaluation.features.device=cpu", "evaluation.split.repeats=1"),
    *("evaluation.statistics.resamples=20", 'models=["random:vitnano8","b=random:vitnano8"]', "protocols=[knn]"),
]


@pytest.fixture
def study(fake_set, tmp_path):
    """A function that runs a study; its folder is tmp_path/out."""
    root = fake_set("ct_contrast").root
    (tmp_path / "study.yaml").write_text("models: [m]\ndata: [{dataset: ct_contrast, root: .}]\n")

    def run(kind, *more):
        words = ["--config", str(tmp_path / "study.yaml"), "--data-root", str(root), "--out", str(tmp_path / "out")]
        return main(["study", kind, *words, *QUICK, *more])

    return run


def test_table_names__two_entries_of_one_name_are_refused():
    twice = [StudyData(dataset="one", root="."), StudyData(dataset="one", root="elsewhere")]
    with pytest.raises(ConfigError, match="entries 1 and 2 of the study's data are both 'one'"):
        table_names(StudyConfig(models=("m",), data=tuple(twice)), ["one", "one"])
    twice[1] = StudyData(dataset="one", root="elsewhere", name="two")
    assert table_names(StudyConfig(models=("m",), data=tuple(twice)), ["one", "one"]) == ["one", "two"]


def test_study__one_data_set_twice_is_told_apart_by_its_names(study, tmp_path, capsys):
    small = "{dataset: ct_contrast, root: ., overrides: [features.image_size_px=16]"
    assert study("compare", f"data=[{{dataset: ct_contrast, root: .}},{small}}}]") == 2
    assert "both 'ct_contrast' in its tables" in capsys.readouterr().err
    assert study("compare", f"data=[{{dataset: ct_contrast, root: .}},{small}, name: small}}]") == 0
    with (tmp_path / "out/results.csv").open() as stream:
        assert [(row["data"], row["model"]) for row in csv.DictReader(stream)] == [
            (data, model) for data in ("ct_contrast", "small") for model in ("random:vitnano8", "b")
        ]
    with (tmp_path / "out/comparison.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    # The same model under two names, of each size beside itself: no difference.
    assert [(row["data"], row["model"], row["difference"].split()[0]) for row in rows] == [
        ("ct_contrast", "b", "+0.000"),
        ("small", "b", "+0.000"),
    ]
    assert "small: auroc with intervals over patients" in (tmp_path / "out/report.html").read_text()


def test_study__writes_over_its_own_files_alone(study, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.csv").write_text("mine")
    assert study("compare") == 2
    assert "holds 'results.csv', and no study compare was begun there" in capsys.readouterr().err
    (out / "results.csv").unlink()
    assert study("compare") == 0
    table = (out / "results.csv").read_bytes()
    assert study("few-shot", "evaluation.few_shot.protocols=[knn]") == 2
    assert "no study few-shot was begun there" in capsys.readouterr().err
    assert main(["study", "lvm-med", "--models", "m", "--root", str(tmp_path), "--out", str(out)]) == 2
    assert (out / "results.csv").read_bytes() == table
    # A study of before kinds were written down goes on, a part of an array of then (which wrote no study.yaml) too.
    settings = (out / "study.yaml").read_text().partition("\n")[2]
    (out / "study.yaml").write_text(settings)
    assert study("compare") == 0 and (out / "study.yaml").read_text() != settings
    (out / "study.yaml").unlink()
    assert study("compare", "--part", "1/2") == 0 and (out / "study.yaml").is_file()
    shutil.rmtree(out / "jobs")
    (out / "study.yaml").write_text(settings)
    assert study("compare") == 2  # settings that a user put there, and no job


def test_study__lvm_med_and_the_others_keep_apart(study, tmp_path, capsys):
    job = tmp_path / "out/jobs/one/job.json"
    job.parent.mkdir(parents=True)
    job.write_text(json.dumps({"model": "m", "task": "t"}))
    (tmp_path / "out/results.csv").write_text("of lvm-med, of a version that wrote no study.yaml")
    assert study("compare") == 2
    assert "no study compare was begun there" in capsys.readouterr().err
