import csv
import json

import numpy as np
import pytest
from meddino_evaluation.cli import main
from meddino_evaluation.detection.metrics import coco_ap
from meddino_evaluation.detection.run import read_per_case
from meddino_evaluation.study.lvm_med import RUNNERS, TaskJob, chosen_tasks, data_folder, list_task_jobs
from meddino_evaluation.study.lvm_med_tables import PUBLISHED, own_setting, published_text
from meddino_evaluation.tasks.definition import load_task, task_names
from meddino_evaluation.tasks.fake_data import make_fake

from meddino.core.errors import ConfigError

QUICK = [
    *("classification:protocols=[linear]", "classification:features.image_size_px=32", "classification:split.repeats=1"),
    *("classification:linear.min_steps=5", "classification:statistics.resamples=20", "classification:features.device=cpu"),
    *("detection:data.image_size_px=64", "detection:device=cpu", "detection:split.repeats=1", "detection:training.epochs=1"),
    *("detection:detector.pyramid_channels=8", "detection:detector.box_head_width=16", "detection:metrics.resamples=20"),
]


def study(root, out, *more, models=("random:vitnano8", "other=random:vitnano8")):
    return main(["study", "lvm-med", "--models", *models, "--root", str(root), "--out", str(out), *more, *QUICK])


def from_per_case_table(path, metric):
    """Compute a headline by a slow loop over what was written of each case."""
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    if metric == "accuracy":
        classes = [name.removeprefix("p_") for name in rows[0] if name.startswith("p_")]
        found = [max(classes, key=lambda one: float(row[f"p_{one}"])) for row in rows]
        return np.mean([one == row["truth"] for one, row in zip(found, rows, strict=True)])
    return np.nanmean([coco_ap(run, 1)[0] for run in read_per_case(path, ["polyp"])])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data of two of the tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    make_fake("kvasir_detection", folder / "kvasir_seg", 12)
    make_fake("brain_tumor_mri", folder / "brain_tumor_mri", 6)
    return folder


def test_study_lvm_med__what_is_there_runs_what_is_missing_is_said_and_published_stands_apart(
    root, tmp_path, capsys, monkeypatch
):
    tasks = ["--tasks", "kvasir_detection,brain_tumor_mri,vindr_cxr"]
    assert study(root, tmp_path, *tasks, "--list") == 0
    said = capsys.readouterr().out
    assert said.count("to do") == 4
    assert "data of 1 of 3 tasks are missing" in said
    assert "physionet.org/content/vindr-cxr" in said
    assert study(root, tmp_path, *tasks, "--part", "1/2") == 0
    assert "2 of 4 jobs are done" in capsys.readouterr().out
    assert study(root, tmp_path, *tasks) == 0
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["task"], row["model"]) for row in rows] == [
        ("kvasir_detection", "random:vitnano8"),
        ("kvasir_detection", "other"),
        ("brain_tumor_mri", "random:vitnano8"),
        ("brain_tumor_mri", "other"),
    ]
    assert rows[2][PUBLISHED].startswith("LVM-Med ResNet-50 66.33 %")
    for row in rows:
        job = next(
            path
            for path in (tmp_path / "jobs").iterdir()
            if path.name.startswith(f"{row['model'].replace(':', '_')}-{row['task']}")
        )
        content = json.loads((job / "metrics.json").read_text())
        kept = content["headline"] if row["metric"] == "ap50" else content["results"][0]["metrics"]["accuracy"]
        assert row["measured"].startswith(f"{kept['mean']:.3f}")
        assert kept["mean"] == pytest.approx(from_per_case_table(job / "per_case.csv", row["metric"]), abs=1e-9)
    compared = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    # Two names of one model: whatever is measured differs by nothing.
    assert [row["difference"].split()[0] for row in compared] == ["+0.000", "+0.000"]
    for name in ("results.md", "results.tex", "comparison.tex", "missing.md", "report.html"):
        assert (tmp_path / name).stat().st_size > 50
    assert "data:image/png;base64" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(TaskJob, "run", lambda *_: pytest.fail("a finished job ran again"))
    assert study(root, tmp_path, *tasks) == 0


def test_study_lvm_med__bad_input_is_one_line(root, tmp_path, capsys):
    assert main(["study", "lvm-med", "--out", str(tmp_path)]) == 2
    assert "needs --models" in capsys.readouterr().err
    assert study(tmp_path / "nothing", tmp_path) == 2
    assert "no task has its data there" in capsys.readouterr().err
    assert study(root, tmp_path, "--tasks", "kvasir") == 2
    assert "no task 'kvasir'" in capsys.readouterr().err
    assert study(root, tmp_path, "detektion:device=cpu") == 2
    assert "'detektion' is no task and no kind" in capsys.readouterr().err
    assert study(root, tmp_path, models=("a=random:vitnano8", "a=random:vitnano8")) == 2
    assert "two models are called a" in capsys.readouterr().err
    assert main(["study", "compare", "--out", str(tmp_path)]) == 2
    assert "needs --config" in capsys.readouterr().err


def test_list_task_jobs__overrides_go_to_their_task_or_kind(root):
    tasks = chosen_tasks(["kvasir_detection", "brain_tumor_mri"])
    jobs, missing = list_task_jobs(["random:vitnano8"], tasks, root, ["a=1", "detection:b=2", "brain_tumor_mri:c=3"])
    assert not missing
    assert {job.task.name: job.overrides for job in jobs} == {
        "kvasir_detection": ("a=1", "b=2"),
        "brain_tumor_mri": ("a=1", "c=3"),
    }
    with pytest.raises(ConfigError, match="no task and no kind"):
        list_task_jobs(["random:vitnano8"], tasks, root, ["x:b=2"])


def test_list_task_jobs__another_setting_is_another_job_another_citation_is_not(root):
    task = load_task("kvasir_detection")
    job = TaskJob("m", task, root)
    assert TaskJob("m", task, root, ("training.epochs=2",)).folder != job.folder
    assert TaskJob("m", task.model_copy(update={"citation": "someone else"}), root).folder == job.folder
    assert data_folder(task, root) == root / "kvasir_seg"


def test_list_task_jobs__changed_data_are_other_jobs(tmp_path):
    make_fake("brain_tumor_mri", tmp_path / "brain_tumor_mri", 3)

    def folder() -> str:
        jobs, _ = list_task_jobs(["random:vitnano8"], chosen_tasks(["brain_tumor_mri"]), tmp_path, [])
        return jobs[0].folder

    first = folder()
    assert folder() == first
    picture = next(path for path in sorted(tmp_path.rglob("*")) if path.is_file())
    picture.rename(picture.with_name(f"other_{picture.name}"))
    assert (second := folder()) != first
    (tmp_path / "brain_tumor_mri" / "labels.csv").write_text("a\n")
    third = folder()
    (tmp_path / "brain_tumor_mri" / "labels.csv").write_text("b\n")  # as long as before
    assert len({first, second, third, folder()}) == 4


def test_shipped__every_task_has_a_runner_and_published_numbers_find_their_row():
    for name in task_names():
        task = load_task(name)
        assert task.kind in RUNNERS
        for one in task.published:
            assert f"{one.value:.2f} %" in published_text(task, one.metric, one.setting)
            assert 0 <= one.value <= 100
            # The settings in which a study's rows come: protocols, sites, or the one that needs no name.
            protocols = {"linear", "mlp", "finetune", "finetune_mlp"} if task.kind == "classification" else {own_setting(task)}
            sites = {"RUNMC", "BIDMC", "HK"} if task.train_sites else set()
            assert one.setting in protocols | sites, name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_study_lvm_med__every_task_from_its_fake_copy_to_one_table(tmp_path):
    root = tmp_path / "root"
    for name in task_names():
        folder = data_folder(load_task(name), root)
        if load_task(name).kind != "prompts":
            make_fake(name, folder, 10 if load_task(name).kind == "detection" else 4)
    slices = ["data.size_px=32", "training.crop_px=32", "training.steps=2", "training.batch_size=2", "encoder.mode=frozen"]
    slices += [
        "head.name=linear",
        "training.selection=last",
        "seeds=[0]",
        "splits.folds=2",
        "device=cpu",
        "metrics.surface=false",
    ]
    prompts = ["size_px=48", "decoder.mlp_dim=64", "decoder.layers=1", "training.steps=2", "training.batch_size=2", "seeds=[0]"]
    words = [f"{kind}:{one}" for kind in ("segmentation2d", "segmentation_slices") for one in slices]
    words += [f"prompts:{one}" for one in [*prompts, "device=cpu", "splits.folds=2"]]
    assert study(root, tmp_path / "out", *words, models=("random:vitnano8",)) == 0
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert {row["task"] for row in rows} == set(task_names())
    assert [row["setting"] for row in rows if row["task"] == "prostate_sites"] == ["BMC", "BIDMC", "HK", "RUNMC"]
    assert (tmp_path / "out/missing.csv").read_text().count("\n") == 1
