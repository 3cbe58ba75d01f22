"""MedDINOTrainer inside nnU-Net, as a user runs it, on the CPU: a few steps, validation, prediction.

nnunetv2 wants another timm than we do, so it gets an environment of its own, laid over this one: minutes long.
MEDDINO_NNUNET_PYTHON names the python of an environment that has nnunetv2 >= 2.8 and meddino already.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch import nn

from meddino.checkpoints.export.write import export_model
from meddino.checkpoints.state.names import checkpoint_name
from meddino.checkpoints.state.training_state import save_training_state
from meddino.data.intensity import CTIntensity
from meddino.models.vision_transformer import VisionTransformer, ViTConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SMALL = ViTConfig(embed_dim=32, depth=4, num_heads=2, patch_size=8, norm_eps=1e-5)
SHORT_TRAINER = """
import meddino_evaluation.nnunet.trainer.meddino_trainer as trainer


class ShortMedDINOTrainer(trainer.MedDINOTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=None):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 2, 1
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    if given := os.environ.get("MEDDINO_NNUNET_PYTHON"):
        return Path(given)
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    lines = [f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"]  # our packages, after its own
    (Path(paths["purelib"]) / "beneath.pth").write_text("\n".join(lines) + "\n")
    own = folder / "bin" / "python"
    done = subprocess.run(
        [own, "-m", "pip", "install", "-q", "nnunetv2>=2.8", "timm>=1.0.20,<1.0.23"],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"nnunetv2 could not be installed: {done.stderr.strip().splitlines()[-1]}")
    return own


def test_trainer__a_few_steps_on_real_ct(python, shared_data, tmp_path):
    model = tmp_path / "model"
    checkpoint = tmp_path / checkpoint_name(1)
    meta = {
        "step": 1,
        "backbone": SMALL.model_dump(mode="json"),
        "input_contract": CTIntensity().model_dump(mode="json"),
        "lineage": {"stages": [{"stage": "s", "steps": 1}], "parent": "scratch"},
    }
    save_training_state(checkpoint, {"teacher": nn.ModuleDict({"backbone": VisionTransformer(SMALL)})}, meta)
    export_model(checkpoint, model)
    raw = _five_cases(shared_data / "segmentation/Dataset901_SarcomaCT", tmp_path / "raw/Dataset901_SarcomaCT")
    short = tmp_path / "short"
    short.mkdir()
    (short / "short_trainer.py").write_text(SHORT_TRAINER)
    environment = {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "nnUNet_raw": str(raw.parent),
        "nnUNet_preprocessed": str(tmp_path / "preprocessed"),
        "nnUNet_results": str(tmp_path / "results"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
    }

    def run(*words: str) -> str:
        done = subprocess.run(words, env=environment, check=False, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run("nnUNetv2_extract_fingerprint", "-d", "901", "-np", "1")
    run("nnUNetv2_plan_experiment", "-d", "901")
    plans = ["nnunet-plans", "901", "--model", str(model), "--side-px", "32", "--batch-size", "2"]
    printed = run(str(python), "-m", "meddino_evaluation.cli", *plans)
    trainer_folder = printed.splitlines()[0].partition("=")[2]
    environment["nnUNet_extTrainer"] = f"{trainer_folder}{os.pathsep}{short}"
    run("nnUNetv2_preprocess", "-d", "901", "-plans_name", "MedDINOPlans", "-c", "2d", "-np", "1")
    out = run("nnUNetv2_train", "901", "2d", "0", "-tr", "ShortMedDINOTrainer", "-p", "MedDINOPlans", "-device", "cpu")
    assert "official names; teacher of a MedDINO model" in out and "Epoch 1" in out
    folder = tmp_path / "results/Dataset901_SarcomaCT/ShortMedDINOTrainer__MedDINOPlans__2d"
    summary = json.loads((folder / "fold_0/validation/summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1
    shutil.rmtree(model)  # prediction needs nnU-Net's own checkpoint only
    run(
        *(
            "nnUNetv2_predict",
            "-i",
            str(raw / "imagesTs"),
            "-o",
            str(tmp_path / "predicted"),
            "-d",
            "901",
            "-c",
            "2d",
            "-f",
            "0",
        ),
        *("-tr", "ShortMedDINOTrainer", "-p", "MedDINOPlans", "-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1"),
    )
    assert len(list((tmp_path / "predicted").glob("*.nii.gz"))) == 1


def _five_cases(source: Path, target: Path) -> Path:
    """Copy the fewest cases that nnU-Net splits into five folds, and one of them as a test case."""
    labels = sorted((source / "labelsTr").glob("*.nii.gz"))[:5]
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (target / folder).mkdir(parents=True)
    for label in labels:
        name = label.name.replace(".nii.gz", "_0000.nii.gz")
        shutil.copyfile(label, target / "labelsTr" / label.name)
        shutil.copyfile(source / "imagesTr" / name, target / "imagesTr" / name)
    shutil.copyfile(source / "imagesTr" / name, target / "imagesTs" / name)
    content = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**content, "numTraining": 5}))
    return target
