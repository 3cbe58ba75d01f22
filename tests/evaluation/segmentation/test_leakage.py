"""From corpus to run to export to evaluation: test volumes that the weights were trained on are named without the corpus."""

import json
import shutil

import pytest
import SimpleITK as sitk
from meddino_data_curation.cli import main as curate
from meddino_evaluation.data.leakage import LeakageCheck
from meddino_evaluation.segmentation.run import segment
from meddino_pretrain.cli import main as pretrain

from meddino.checkpoints.cli import main as export
from meddino.checkpoints.export import lineage
from meddino.checkpoints.export.lineage import training_volumes
from meddino.core.errors import CheckpointError
from meddino.data.corpus import Corpus
from meddino.data.overlap import VOLUMES_FILE, content_key, volume_hashes
from tests.conftest import PROJECT

SHORT = ["--stage", "stage1_pretrain", "stages.stage1_pretrain.steps=3"]
SMALL = ["slices.min_size_px=8", "slices.min_body_fraction=0", "duplicates.near=false", "workers=1"]


def build(source, out, tmp_path, *more):
    (tmp_path / "salt").write_text("tests only\n")
    return curate(["build", str(source), "--out", str(out), f"privacy.salt_file={tmp_path / 'salt'}", *SMALL, *more])


def test_segment__names_test_volumes_of_the_training_corpus_from_the_export_alone(
    make_dataset, tiny_config, tmp_path, monkeypatch
):
    data = make_dataset()
    (tmp_path / "scans").mkdir()
    for name in ("case_00", "case_01"):  # two of the four, in another guise of file
        image = sitk.ReadImage(str(data / "imagesTr" / f"{name}_0000.nii.gz"))
        sitk.WriteImage(sitk.DICOMOrient(sitk.Cast(image, sitk.sitkFloat32), "RAS"), str(tmp_path / "scans" / f"{name}.nrrd"))
    corpus, run, model = (tmp_path / name for name in ("corpus", "run", "model"))
    assert build(tmp_path / "scans", corpus, tmp_path) == 0
    assert pretrain([str(PROJECT / "tests/pretrain/tiny.yaml"), "--corpus", str(corpus), "--out", str(run), *SHORT]) == 0
    assert export([str(run), "--out", str(model)]) == 0
    listed = (model / VOLUMES_FILE).read_text().split()
    assert listed == sorted(content_key(name) for name in volume_hashes(Corpus(corpus)))
    record = json.loads((model / "config.json").read_text())["lineage"]["training_volumes"]
    assert record["volumes"] == len(listed) == 2
    assert export([str(model), "--out", str(tmp_path / "again")]) == 0  # an export of an export keeps it
    assert training_volumes(tmp_path / "again") == frozenset(listed)
    shutil.rmtree(corpus)
    shutil.rmtree(run)
    metrics = segment(tiny_config(seeds=[0], encoder={"taps": 2}), str(model), data, tmp_path / "results")
    test = json.loads((tmp_path / "results" / "splits.json").read_text())[0]["test"]
    leakage = metrics["leakage"]
    assert (leakage["checked"], leakage["compared_with"], leakage["kinds"]) == (True, "the list in the export", ["exact"])
    assert leakage["test_cases_in_pretraining"] == sorted({"case_00", "case_01"} & set(test))
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    (damaged / VOLUMES_FILE).write_text("0000\n")
    with pytest.raises(CheckpointError, match="not the list"):
        training_volumes(damaged)
    (damaged / VOLUMES_FILE).unlink()
    told: list[str] = []
    monkeypatch.setattr(lineage.logger, "warning", lambda text, *values: told.append(text % values))
    assert training_volumes(damaged) is None
    assert len(told) == 1 and "training_volumes.txt is not there" in told[0]
    assert LeakageCheck({}, None, str(damaged)).known is False


def test_volume_hashes__volumes_that_were_kept_out_are_not_among_them(make_dataset, tmp_path):
    data = make_dataset()
    (tmp_path / "held").mkdir()
    shutil.copy(data / "imagesTr" / "case_03_0000.nii.gz", tmp_path / "held")
    shutil.copy(data / "imagesTr" / "case_02_0000.nii.gz", data / "imagesTr" / "copy_02_0000.nii.gz")
    assert build(data / "imagesTr", tmp_path / "corpus", tmp_path, "--exclude", str(tmp_path / "held")) == 0
    rows = Corpus(tmp_path / "corpus").volumes.to_pylist()
    assert sorted(row["status"] for row in rows) == ["accepted"] * 3 + ["duplicate", "rejected"]
    held = next(row["content_hash"] for row in rows if row["status"] == "rejected")
    assert held is not None
    check = LeakageCheck({}, tmp_path / "corpus")
    check.look("kept out", held)
    assert check.overlap == []
    check.look("seen", next(row["content_hash"] for row in rows if row["status"] == "duplicate"))
    assert check.summary()["test_cases_in_pretraining"] == ["seen"]
