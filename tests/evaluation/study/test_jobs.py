import json
from types import SimpleNamespace

import numpy as np
import pytest
from meddino_evaluation.cli import main
from meddino_evaluation.study import jobs as study
from meddino_evaluation.study.classification_jobs import ClassificationJob, list_jobs
from meddino_evaluation.study.config import StudyConfig
from meddino_evaluation.study.jobs import parse_part, run_jobs
from PIL import Image

from meddino.core.config import load_config
from meddino.core.errors import ConfigError
from meddino.core.files import locked_folder
from tests.browser import check_page

STUDY = """
models: ["random:vitnano8", "random:timm:resnet10t"]
data:
  - {dataset: ct_contrast, root: ct_contrast}
  - {dataset: pneumoniamnist, root: pneumoniamnist, overrides: [split.repeats=2]}
protocols: [knn, linear]
evaluation:
  features: {image_size_px: 32, device: cpu}
  split: {repeats: 1}
  linear: {min_steps: 5, learning_rates: [0.01]}
  finetune: {epochs: 1}
  few_shot: {patients_per_class: [1, 2], draws: 2, protocols: [knn]}
  statistics: {resamples: 30}
"""


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    from meddino_evaluation.classification.fake_data import make_fake

    root = tmp_path_factory.mktemp("data")
    for name in ("ct_contrast", "pneumoniamnist"):
        make_fake(name, root / name)
    return root


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def load_study(source, overrides):
    return load_config(StudyConfig, [source], overrides, kind="evaluation")


def _study(kind, config, data_root, out, *more):
    return main(["study", kind, "--config", str(config), "--data-root", str(data_root), "--out", str(out), *more])


def test_study__compare_is_resumable_and_writes_every_format(config, data_root, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert _study("compare", config, data_root, out, "--part", "1/2") == 0
    assert "4 of 8 jobs are done" in capsys.readouterr().out
    done = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")}
    assert _study("compare", config, data_root, out) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    for name in ("results", "comparison"):
        for suffix in ("csv", "md", "tex"):
            assert (out / f"{name}.{suffix}").stat().st_size > 50
    page = (out / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert (out / "results.csv").read_text().count("\n") == 9
    comparison = (out / "comparison.csv").read_text().splitlines()
    assert len(comparison) == 5  # two data sets, two protocols, one model against the reference
    assert "Holm permutation" in comparison[0]
    before = (out / "results.csv").read_bytes()
    monkeypatch.setattr(ClassificationJob, "run", lambda *_: pytest.fail("a finished job ran again"))
    assert _study("compare", config, data_root, out) == 0
    assert (out / "results.csv").read_bytes() == before


def test_study__parts_of_a_slurm_array_give_the_same_results_as_one_process(config, data_root, tmp_path, monkeypatch):
    one_model = 'models=["random:vitnano8"]'
    assert _study("compare", config, data_root, tmp_path / "one", one_model) == 0
    for name, value in (("COUNT", "3"), ("MIN", "5")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    for task in (7, 5, 6):  # in any order
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert _study("compare", config, data_root, tmp_path / "parts", one_model) == 0
    files = [path.relative_to(tmp_path / "one") for path in sorted((tmp_path / "one").rglob("*.csv"))]
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file
    assert (tmp_path / "parts/report.html").is_file()


def test_list_jobs__another_state_of_a_run_is_another_job(config, data_root, tmp_path, monkeypatch):
    run, state = tmp_path / "run", {"hash": "a"}
    run.mkdir()
    monkeypatch.setattr(study, "load_backbone", lambda model: SimpleNamespace(hash=lambda: state["hash"]))
    changed = load_study(str(config), [f'models=["{run}"]'])
    first = list_jobs("compare", changed, tmp_path, data_root=data_root)
    state["hash"] = "b"
    assert {job.folder for job in first}.isdisjoint(
        j.folder for j in list_jobs("compare", changed, tmp_path, data_root=data_root)
    )


def test_list_jobs__two_models_of_one_name_are_refused(config, data_root, tmp_path):
    for models in ('["a/model","b/model"]', '["A=a/model","A=b/model"]'):
        with pytest.raises(ConfigError, match="in its tables: write NAME=MODEL"):
            list_jobs("compare", load_study(str(config), [f"models={models}"]), tmp_path, data_root=data_root)


def test_config__a_study_of_no_protocol_is_refused(config):
    with pytest.raises(ConfigError, match="protocols"):
        load_study(str(config), ["protocols=[]"])


def test_list_jobs__other_labels_are_other_jobs(tmp_path):
    for name in ("a", "b"):
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / f"{name}.png")
    table = tmp_path / "set.csv"
    table.write_text(f"image,label,patient\n{tmp_path}/a.png,x,p\nb.png,y,q\n")  # an absolute path is one too
    config = load_study("study_demo", [f"data=[{{dataset: {table}, root: .}}]"])
    first = list_jobs("compare", config, tmp_path, "random:vitnano8")
    assert [job.folder for job in list_jobs("compare", config, tmp_path, "random:vitnano8")] == [job.folder for job in first]
    table.write_text("image,label,patient\na.png,y,p\nb.png,x,q\n")
    again = list_jobs("compare", config, tmp_path, "random:vitnano8")
    assert first and {job.folder for job in first}.isdisjoint(job.folder for job in again)


def test_list_jobs__other_parts_another_split_file_and_another_window_are_other_jobs(tmp_path):
    for name in ("a", "b"):
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / f"{name}.png")
    split = tmp_path / "split.json"
    split.write_text("[]")
    definition = "name: set\nlayout: {kind: table, tables: [t.csv], image: '{image}', label_columns: [label], id_column: image"
    definition += ", patient_column: patient, split_column: part, split_values: {train: train, test: test}}\n"
    definition += "modality: ct\ntask: binary\nclasses: [x, y]\n"

    def folders(parts: str, window: str = "") -> set[str]:
        first, second = parts.split()
        (tmp_path / "t.csv").write_text(f"image,label,patient,part\na.png,x,p,{first}\nb.png,y,q,{second}\n")
        (tmp_path / "set.yaml").write_text(definition + window)
        given = [f"data=[{{dataset: {tmp_path}/set.yaml, root: {tmp_path}, overrides: ['split.file={split}']}}]"]
        jobs = list_jobs("compare", load_study("study_demo", given), tmp_path, "random:vitnano8")
        assert all(job.cases for job in jobs)
        return {job.folder for job in jobs}

    first = folders("train test")
    assert folders("train test") == first
    others = [folders("test train"), folders("train test", "window_hu: [-160, 240]\n")]
    split.write_text("[ ]")
    others.append(folders("train test"))
    assert all(first.isdisjoint(other) for other in others)


def test_weights_hash__of_a_transformers_folder_and_of_random_weights_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"1")
    first = study.weights_hash(f"hf:{tmp_path}/hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"2")
    assert first and study.weights_hash(f"hf:{tmp_path}/hf") != first
    monkeypatch.setattr(study, "load_backbone", lambda model: SimpleNamespace(hash=lambda: model))
    assert study.weights_hash(f"NAME=random:{tmp_path}/hf@3") == f"random:{tmp_path}/hf@3"
    assert study.weights_hash("random:vitnano8@3") is None
    monkeypatch.setenv("MEDDINO_WEIGHTS", str(tmp_path))
    assert study.weights_hash("dinov2_vits14") is None
    (tmp_path / "dinov2_vits14.pth").write_bytes(b"1")
    assert study.weights_hash("dinov2_vits14")


def test_study__freeze_and_few_shot(config, data_root, tmp_path):
    assert _study("freeze", config, data_root, tmp_path / "freeze", "data=[{dataset: ct_contrast, root: ct_contrast}]") == 0
    rows = (tmp_path / "freeze" / "results.csv").read_text()
    assert rows.count(",frozen,") == 2
    assert rows.count(",unfrozen,") == 2
    assert "parameters [M]" in rows
    assert _study("few-shot", config, data_root, tmp_path / "few") == 0
    assert "shots=2" in (tmp_path / "few" / "results.csv").read_text()
    html = (tmp_path / "few" / "report.html").read_text()
    assert "training patients a class" in html
    assert ("dashed: by the share of patients" in html) == ("fraction=" in (tmp_path / "few" / "results.csv").read_text())
    check_page(tmp_path / "few" / "report.html")


def test_study__missing_weights_stop_their_jobs_and_no_other(config, data_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MEDDINO_WEIGHTS", str(tmp_path / "weights"))
    code = _study("compare", config, data_root, tmp_path / "out", 'models=["random:vitnano8",dinov2_vits14]', "protocols=[knn]")
    assert code == 2
    assert "dinov2_vits14.safetensors" in capsys.readouterr().err
    assert len(list((tmp_path / "out").rglob("metrics.json"))) == 2
    assert len(list((tmp_path / "out").rglob("error.txt"))) == 2
    assert "Not done" in (tmp_path / "out" / "report.html").read_text()


def test_list_jobs__another_setting_is_another_job(config, data_root, tmp_path):
    first = list_jobs("compare", load_study(str(config), []), tmp_path, data_root=data_root)
    other = list_jobs("compare", load_study(str(config), ["evaluation.knn.temperature=0.1"]), tmp_path, data_root=data_root)
    assert {job.folder for job in first}.isdisjoint(job.folder for job in other)
    elsewhere = list_jobs("compare", load_study(str(config), []), tmp_path / "elsewhere", data_root=data_root)
    assert [job.folder for job in first] == [job.folder for job in elsewhere]
    assert [job.evaluation.split.repeats for job in first] == [1] * 4 + [2] * 4


def test_list_jobs__model_placeholder(tmp_path):
    config = load_study("study_acceptance", [])
    jobs = list_jobs("compare", config, tmp_path, "random:vitnano8", tmp_path)
    assert len(jobs) == 2 * 4 * 5
    with pytest.raises(ConfigError, match="--model"):
        list_jobs("compare", config, tmp_path)


def test_list_jobs__wrong_override_is_named(config, tmp_path):
    changed = load_study(str(config), ["data=[{dataset: ct_contrast, root: x, overrides: [split.repeat=3]}]"])
    with pytest.raises(ConfigError, match="did you mean 'repeats'"):
        list_jobs("compare", changed, tmp_path)


@pytest.mark.parametrize("name", ["study_demo", "study_freeze", "study_few_shot"])
def test_shipped_studies__load(name, tmp_path):
    assert list_jobs("freeze" if "freeze" in name else "few-shot", load_study(name, []), tmp_path, "random:vitnano8")


def test_parse_part__text_and_slurm_array(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT", raising=False)
    assert parse_part(None) is None
    assert parse_part("2/8") == (2, 8)
    with pytest.raises(ConfigError, match="1 <= i <= n"):
        parse_part("0/8")
    for name, value in (("COUNT", "4"), ("ID", "12"), ("MIN", "10")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert parse_part(None) == (3, 4)


def test_compare__parts_share_the_folder_that_one_process_has_to_itself(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr("meddino_evaluation.study.compare_command.run", ran.append)
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT", raising=False)
    words = ["compare", "--out", str(tmp_path)]
    with locked_folder(tmp_path):
        assert main(words) == 2
        assert str(tmp_path) in capsys.readouterr().err
        assert main([*words, "--list"]) == 0
        assert main([*words, "--part", "1/2"]) == 0
        for name, value in (("COUNT", "2"), ("ID", "1"), ("MIN", "0")):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
        assert main(words) == 0
    assert len(ran) == 3


@pytest.mark.parametrize(
    "words",
    [
        ["segment", "--model", "m", "--data", "d"],
        ["probe", "--model", "a=m", "--data", "d"],
        ["study", "compare", "--config", "c"],
    ],
)
def test_commands__two_at_a_time_in_one_folder_are_refused_before_anything_is_read(tmp_path, capsys, monkeypatch, words):
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT", raising=False)
    with locked_folder(tmp_path / "out"):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        assert list((tmp_path / "out").iterdir()) == []
    assert "another command is writing into" in capsys.readouterr().err


def test_run_jobs__parts_cover_every_job_once(config, data_root, tmp_path, monkeypatch):
    jobs = list_jobs("compare", load_study(str(config), []), tmp_path, data_root=data_root)
    ran = []
    monkeypatch.setattr(ClassificationJob, "run", lambda job, folder: ran.append(job.folder))
    for part in range(3):
        run_jobs(jobs, tmp_path, (part + 1, 3))
    assert sorted(ran) == sorted(job.folder for job in jobs)


def test_knn_command__end_to_end_and_bad_input(data_root, tmp_path, capsys):
    words = [
        "--model",
        "random:vitnano8",
        "--data",
        "ct_contrast",
        "--root",
        str(data_root / "ct_contrast"),
        "--out",
        str(tmp_path),
    ]
    quick = ["features.image_size_px=32", "split.repeats=1", "statistics.resamples=20"]
    assert main(["knn", *words, *quick]) == 0
    assert "| protocol | training | auroc |" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["results"][0]["protocol"] == "knn"
    assert main(["retrieve", *words[:-1], str(tmp_path / "r"), *quick]) == 0
    assert "average_precision: " in capsys.readouterr().out
    assert main(["knn", *words, "features.image_size_px=33"]) == 2
    assert "multiples of 8" in capsys.readouterr().err
    assert main(["knn", *words, "knn.neighbors=[1]"]) == 2
    assert "did you mean 'neighbours'" in capsys.readouterr().err


def test_datasets_command(tmp_path, capsys):
    assert main(["datasets", "list"]) == 0
    assert "nih_chestxray14" in capsys.readouterr().out
    assert main(["datasets", "fake", "brain_mri", "--out", str(tmp_path / "b")]) == 0
    assert main(["datasets", "check", "brain_mri", "--root", str(tmp_path / "b")]) == 0
    assert "36 cases of 9 patients, all readable" in capsys.readouterr().out
    assert main(["datasets", "fake", "nothing", "--out", str(tmp_path)]) == 2
    assert main(["datasets", "prepare", "brain_mri", "--root", str(tmp_path / "b"), "--out", str(tmp_path / "n")]) == 2
    assert "not for segmentation" in capsys.readouterr().err
    assert main(["datasets", "check"]) == 2
