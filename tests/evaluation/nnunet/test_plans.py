"""Plans and network for nnU-Net, without nnU-Net: the contract, the shapes, the rates; wrong input."""

import json

import pytest
import torch
from meddino_evaluation.cli import main
from meddino_evaluation.nnunet.network import LinearDecay, network_from_plans
from meddino_evaluation.nnunet.plans_command import INTENSITIES, TRAINER_FOLDER, make_plans

from meddino.checkpoints.export.model import random_model
from meddino.core.errors import ConfigError
from meddino.data.intensity import CTIntensity
from meddino.models.vision_transformer import ViTConfig

SMALL = ViTConfig(embed_dim=32, depth=4, num_heads=2, patch_size=8)
CONTRACT = CTIntensity(hu_min=-200.0, hu_max=300.0, mean=50.0, std=80.0)


def own_plans() -> dict:
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "batch_size": 12,
        "patch_size": [160, 320],
        "spacing": [0.8, 0.8],
        "median_image_size_in_voxels": [158.0, 300.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [True],
    }
    return {
        "plans_name": "nnUNetPlans",
        "configurations": {"2d": configuration, "3d_fullres": {}},
        INTENSITIES: {"0": {"mean": 1.0, "std": 2.0}},
    }


def test_plans__nnunets_ct_normalisation_becomes_the_contract():
    model = random_model(SMALL, contract=CONTRACT)
    plans = make_plans(own_plans(), model, "MedDINOPlans", side_px=64)
    assert plans["configurations"]["2d"]["normalization_schemes"] == ["CTNormalization"]
    numbers = plans[INTENSITIES]["0"]
    hu = 400 * torch.randn(16, 32)  # whole patches: nothing is padded
    # What nnU-Net's CTNormalization does, written out.
    normalised = (hu.clamp(numbers["percentile_00_5"], numbers["percentile_99_5"]) - numbers["mean"]) / max(
        numbers["std"], 1e-8
    )
    assert torch.equal(normalised.expand(3, 16, 32), model.preprocess(hu))


def test_plans__the_patch_covers_what_it_covered():
    plans = make_plans(own_plans(), random_model(SMALL), "Mine", side_px=80, batch_size=3)
    configuration = plans["configurations"]["2d"]
    assert configuration["patch_size"] == [80, 80] and configuration["batch_size"] == 3
    assert configuration["spacing"] == [pytest.approx(0.8 * 160 / 80), pytest.approx(0.8 * 320 / 80)]
    assert configuration["median_image_size_in_voxels"] == [pytest.approx(79), pytest.approx(75)]
    assert configuration["data_identifier"] == "Mine_2d" and plans["plans_name"] == "Mine"
    assert list(plans["configurations"]) == ["2d"]


def test_command__writes_plans_and_says_what_comes_next(tmp_path, capsys, monkeypatch):
    dataset = tmp_path / "Dataset901_X"
    dataset.mkdir()
    (dataset / "nnUNetPlans.json").write_text(json.dumps(own_plans()))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    model = tmp_path / "model"
    monkeypatch.setattr("meddino_evaluation.nnunet.plans_command.load", lambda path: random_model(SMALL))
    assert main(["nnunet-plans", "901", "--model", str(model), "--side-px", "64"]) == 0
    plans = json.loads((dataset / "MedDINOPlans.json").read_text())
    assert plans["meddino"]["model"] == str(model)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"export nnUNet_extTrainer={TRAINER_FOLDER}" and (TRAINER_FOLDER / "meddino_trainer.py").is_file()
    assert lines[2] == "nnUNetv2_train Dataset901_X 2d 0 -tr MedDINOTrainer -p MedDINOPlans"

    for arguments, message in (
        (["901", "--side-px", "60"], "no multiple of the model's patch size 8"),
        (["902"], "no data set '902'"),
        (["901", "--plans", "Other"], "no readable plans"),
    ):
        assert main(["nnunet-plans", *arguments, "--model", str(model)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_preprocessed")
    assert main(["nnunet-plans", "901", "--model", str(model)]) == 2
    assert "set nnUNet_preprocessed" in capsys.readouterr().err


def test_network__from_plans():
    plans = make_plans(own_plans(), random_model(SMALL), "Mine", side_px=64)
    network = network_from_plans(plans, 1, 5, drop_path=0.2)
    assert network.backbone.config.drop_path == 0.2 and network.taps == (0, 1, 2, 3)
    assert network(torch.randn(2, 1, 24, 40)).shape == (2, 5, 24, 40)
    groups = network.parameter_groups(3e-4, 3e-5)
    assert [group["lr"] for group in groups] == [3e-4, 3e-5]
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    with pytest.raises(ConfigError, match=r"do not name a MedDINO model.*nnunet-plans"):
        network_from_plans(own_plans(), 1, 5, 0.2)
    with pytest.raises(ConfigError, match="2 image channels"):
        network_from_plans(plans, 2, 5, 0.2)


def test_linear_decay__every_group_to_zero():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [parameters[0]], "lr": 0.4}, {"params": [parameters[1]], "lr": 0.1}])
    decay = LinearDecay(optimizer, 4)
    seen = []
    for epoch in range(4):
        decay.step(epoch)
        seen.append([round(group["lr"], 6) for group in optimizer.param_groups])
    assert seen == [[0.4, 0.1], [0.3, 0.075], [0.2, 0.05], [0.1, 0.025]]
