"""What a stranger's pictures may hold is one line with names, in both commands that read masks."""

import json

import numpy as np
import pytest
from meddino_evaluation.cli import main

from tests.evaluation.tasks.test_prepare import save
from tests.evaluation.tasks.test_run import MODEL, QUICK

PROMPTS = ("size_px=48", "decoder.mlp_dim=32", "decoder.layers=1", "training.steps=1", "training.batch_size=2", "device=cpu")
COMMANDS = {
    "segment": (*QUICK, "training.steps=1", "metrics.surface=false"),
    "prompt": (*PROMPTS, "seeds=[0]", "metrics.surface=false", "metrics.bootstrap=100"),
}


@pytest.fixture
def pictures(tmp_path):
    """Four pictures beside masks of the values 0 and 1, and the folds that say who is tested."""
    rng = np.random.default_rng(0)
    for number in range(4):
        mask = np.zeros((48, 48), dtype=np.uint8)
        mask[10 : 30 + number, 12:32] = 1
        save(tmp_path / f"set/images/p{number}.png", np.clip(70 + 100 * mask + rng.normal(0, 10, mask.shape), 0, 255))
        save(tmp_path / f"set/masks/p{number}.png", mask)
    (tmp_path / "splits.json").write_text(json.dumps([{"train": ["p0", "p1"], "val": ["p2", "p3"]}]))
    return tmp_path / "set"


@pytest.fixture(params=COMMANDS)
def command(request, pictures, tmp_path, capsys):
    """A function that runs a command on the pictures and returns its exit code and the last line of the error stream."""

    def run(*more):
        words = [request.param, "--model", MODEL, "--data", str(pictures), "--out", str(tmp_path / "out")]
        code = main([*words, *COMMANDS[request.param], f"splits.file={tmp_path / 'splits.json'}", *more])
        return code, capsys.readouterr().err.strip().splitlines()

    return run


def test_a_picture_of_one_value_is_named_in_training_and_left_out_of_the_test_by_name(pictures, command, tmp_path):
    save(pictures / "images/p3.png", np.full((48, 48), 7))
    assert command()[0] == 0
    failed = json.loads((tmp_path / "out/metrics.json").read_text())["failed"]
    assert failed.keys() == {"p3"} and "p3.png is empty: every pixel is 7" in failed["p3"]
    save(pictures / "images/p1.png", np.full((48, 48), 8))
    code, lines = command()
    assert code == 2 and "p1.png is empty: every pixel is 8" in lines[-1]


def test_a_mask_of_another_size_is_named_with_both_sizes(pictures, command):
    save(pictures / "masks/p3.png", np.ones((24, 48)))
    code, lines = command()
    assert code == 2 and "case p3: mask p3.png has 24 x 48 pixels, its image 48 x 48" in lines[-1]


def test_a_class_that_never_occurs_is_told_in_training_and_test_and_has_no_number(pictures, command, tmp_path):
    (pictures / "labels.json").write_text(json.dumps({"background": 0, "square": 1, "violet": 2}))
    code, lines = command()
    assert code == 0 and any("no training slice holds the labels ['violet']" in line for line in lines)
    test = json.loads((tmp_path / "out/metrics.json").read_text())["test"]
    assert test["by_label"]["square"]["dice"]["mean"] is not None


def test_pictures_of_mixed_modality_are_named(pictures, command):
    (pictures / "labels.json").write_text(json.dumps({"background": 0, "square": 1}))
    rows = [f"p{number},images/p{number}.png,masks/p{number}.png,{'mr' if number == 2 else 'image'}" for number in range(4)]
    (pictures / "cases.csv").write_text("\n".join(["case,image,label,modality", *rows]))
    code, lines = command()
    assert code == 2 and "images of mixed modality: image (case p0), mr (case p2)" in lines[-1]


def test_no_mask_holds_anything(pictures, command):
    (pictures / "labels.json").write_text(json.dumps({"background": 0, "square": 1}))
    for number in (0, 1):
        save(pictures / f"masks/p{number}.png", np.zeros((48, 48)))
    code, lines = command()
    assert code == 2 and "holds a label" in lines[-1]
