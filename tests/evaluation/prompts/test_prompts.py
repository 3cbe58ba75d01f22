"""Boxes and points from masks, the decoder against transformers' own SAM, what is held, and whole small runs."""

import csv
import json

import numpy as np
import pytest
import torch
from meddino_evaluation.adaptation.fitting import FitLoop, load_state
from meddino_evaluation.backbones.adapter import state_hash
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.cli import main
from meddino_evaluation.data.dataset import LabelledDataset
from meddino_evaluation.prompts.config import DecoderConfig, PromptsConfig
from meddino_evaluation.prompts.drawing import Prompt, box_of, moved_out, points_in
from meddino_evaluation.prompts.fitting import mask_loss
from meddino_evaluation.prompts.masks import drawn_prompt
from meddino_evaluation.prompts.network import PromptNetwork
from meddino_evaluation.prompts.run import run_task
from meddino_evaluation.tasks.definition import load_task
from meddino_evaluation.tasks.fake_data import make_fake
from PIL import Image

from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng

MODEL = "random:vitnano8"
SMALL = DecoderConfig(mlp_dim=32, layers=1)
QUICK = (
    *("size_px=48", "decoder.mlp_dim=64", "decoder.layers=1", "training.steps=40", "training.batch_size=4", "training.lr=1e-3"),
    *("seeds=[0]", "splits.folds=2", "device=cpu", "metrics.bootstrap=100"),
)
MASK = np.zeros((20, 30), dtype=bool)
MASK[4:9, 10:17] = True


def test_box_of__literal():
    assert box_of(MASK) == (10, 4, 16, 8)
    assert box_of(np.ones((1, 1), dtype=bool)) == (0, 0, 0, 0)


def test_moved_out__each_side_by_zero_to_the_margin_and_never_out_of_the_picture():
    moved = np.array([moved_out((10, 4, 16, 8), 6, MASK.shape, numpy_rng(0, place)) for place in range(300)])
    low, high = moved.min(0), moved.max(0)
    np.testing.assert_array_equal(high, [10, 4, 22, 14])
    np.testing.assert_array_equal(low, [4, 0, 16, 8])  # y would be -2
    assert len(np.unique(moved, axis=0)) > 100  # each side for itself


def test_points_in__the_first_is_the_deepest_and_all_are_inside():
    points = points_in(MASK, 5, numpy_rng(0))
    assert points[0] in {(12, 6), (13, 6), (14, 6)}
    assert all(MASK[int(y), int(x)] for x, y in points)


def test_drawn_prompt__the_margin_is_of_a_picture_of_1024():
    boxes = [drawn_prompt(MASK, PromptsConfig(box_margin_px=200), 128, place).box for place in range(200)]
    assert min(box[0] for box in boxes) == 0 and max(box[2] for box in boxes) == 29
    far = [drawn_prompt(MASK, PromptsConfig(box_margin_px=20), 128, place).box[0] for place in range(200)]
    assert min(far) == 10 - round(20 * 128 / 1024)
    assert drawn_prompt(MASK, PromptsConfig(), 128, "a") == drawn_prompt(MASK, PromptsConfig(), 128, "a")


def test_scaled__keeps_pixel_borders_where_they_are():
    # Pixels 0 to 9 of 10 become pixels 0 to 19 of 20: their outer borders, -0.5 and 9.5, become -0.5 and 19.5.
    prompt = Prompt((-0.5, -0.5, 9.5, 9.5), ((4.5, 4.5),)).scaled(2, 3)
    assert prompt == Prompt((-0.5, -0.5, 19.5, 29.5), ((9.5, 14.5),))


def test_mask_loss__equals_monais_dice_and_torchs_cross_entropy():
    from monai.losses import DiceLoss

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 9, generator=generator)
    wanted = torch.rand(3, 8, 9, generator=generator) > 0.6
    everywhere = torch.ones_like(wanted)
    dice = DiceLoss(sigmoid=True, smooth_nr=1e-5, smooth_dr=1e-5)(logits[:, None], wanted[:, None].float())
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted.float())
    torch.testing.assert_close(mask_loss(logits, wanted, everywhere, 1.0, 0.0), dice)
    torch.testing.assert_close(mask_loss(logits, wanted, everywhere, 0.0, 1.0), entropy)
    half = everywhere.clone()
    half[:, :, 5:] = False
    cut = mask_loss(logits[:, :, :5], wanted[:, :, :5], everywhere[:, :, :5], 1.0, 1.0)
    torch.testing.assert_close(mask_loss(logits, wanted, half, 1.0, 1.0), cut)


def small_network(model=MODEL, size_px=48, seed=0):
    backbone = load_backbone(model)
    return PromptNetwork(backbone, backbone.contract, size_px, SMALL, seed).eval()


def test_prompt_network__gives_what_transformers_sam_gives_from_the_same_parts():
    from transformers import SamConfig, SamModel

    network = small_network()
    whole = SamModel(
        SamConfig(
            vision_config={
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "image_size": 48,
                "patch_size": 8,
            },
            prompt_encoder_config={"image_size": 48, "patch_size": 8},
            mask_decoder_config={"mlp_dim": 32, "num_hidden_layers": 1},
        )
    ).eval()
    whole.prompt_encoder.load_state_dict(network.prompt_encoder.state_dict())
    whole.shared_image_embedding.load_state_dict(network.prompt_encoder.shared_embedding.state_dict())
    whole.mask_decoder.load_state_dict(network.mask_decoder.state_dict())
    maps = torch.randn(2, network.backbone.embed_dim, 6, 6, generator=torch.Generator().manual_seed(0))
    boxes, points = [(3.0, 4.0, 20.0, 30.0), (0.0, 0.0, 47.0, 47.0)], [((9.0, 9.0),), ((20.0, 30.0),)]
    with torch.no_grad():
        embeddings = network.neck(maps)
        for kind in ("box", "point", "both"):
            given = {}
            if kind != "point":
                given["input_boxes"] = torch.tensor(boxes)[:, None]
            if kind != "box":
                given |= {"input_points": torch.tensor(points)[:, None], "input_labels": torch.ones(2, 1, 1, dtype=torch.int64)}
            expected = whole(image_embeddings=embeddings, multimask_output=False, **given).pred_masks[:, 0]
            expected = torch.nn.functional.interpolate(expected, size=(48, 48), mode="bilinear", align_corners=False)[:, 0]
            prompts = [
                Prompt(box if kind != "point" else None, point if kind != "box" else ())
                for box, point in zip(boxes, points, strict=True)
            ]
            torch.testing.assert_close(network(maps, prompts), expected)


def test_check_model__sizes_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="cells of 8 px: use a multiple of 8"):
        small_network(size_px=44)


def test_run_task__boxes_on_pictures_learn_and_hold_everything_but_neck_and_decoder(tmp_path, capsys, monkeypatch):
    make_fake("isic2018", tmp_path / "root", 4)
    out, events = tmp_path / "out", []
    read, fit = LabelledDataset.read_images, FitLoop.fit
    monkeypatch.setattr(
        LabelledDataset, "read_images", lambda self, case, channels: (events.append(case.name), read(self, case, channels))[1]
    )
    monkeypatch.setattr(FitLoop, "fit", lambda self, *given: (fit(self, *given), events.append("trained"))[0])
    run_task(load_task("isic2018_boxes"), MODEL, tmp_path / "root", out, QUICK)
    parts = json.loads((out / "splits.json").read_text())[0]
    at = events.index("trained")
    assert sorted(events[at + 1 :]) == sorted(parts["test"]) and not set(events[:at]) & set(parts["test"])
    metrics = json.loads((out / "metrics.json").read_text())
    rows = list(csv.DictReader((out / "cases.csv").open()))
    assert metrics["headline"]["mean"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=1e-5)
    assert metrics["headline"]["mean"] > 0.6
    assert "mask decoder trained" in (out / "report.html").read_text()
    # The prompt encoder in the saved weights is that of a fresh network of the seed; neck and decoder have moved.
    backbone = load_backbone(MODEL)
    fresh = PromptNetwork(backbone, backbone.contract, 48, DecoderConfig(mlp_dim=64, layers=1), 0)
    before = {name: state_hash(part) for name, part in {**fresh.parts, "prompt_encoder": fresh.prompt_encoder}.items()}
    load_state(fresh, out / "weights/fold-0_seed-0.safetensors", fresh.own_state())
    moved = {name: state_hash(getattr(fresh, name)) != before[name] for name in before}
    assert moved == {"neck": True, "mask_decoder": True, "prompt_encoder": False}
    picture = next((tmp_path / "root/ISIC2018_Task1-2_Training_Input").glob("*.jpg"))
    words = ["predict", "--results", str(out), "--input", str(picture), "--out", str(tmp_path / "own")]
    assert main([*words, "--box", "10,10,38,38", "--point", "2,2"]) == 0
    mask = np.asarray(Image.open(tmp_path / f"own/{picture.stem}.png"))
    assert mask.shape == (48, 48) and (mask == 1).sum() > 200
    assert (tmp_path / f"own/{picture.stem}_overlay.png").is_file()
    for options, message in (
        (["--box", "10,10,60,38"], "lies outside: x is 0 to 47"),
        (["--box", "10,10,38"], "write x0,y0,x1,y1"),
        (["--box", "20,10,10,38"], "is empty"),
        ([], "give --box"),
    ):
        assert main([*words, *options]) == 2
        assert message in capsys.readouterr().err


def test_prompt_network__batch_norms_of_the_image_encoder_are_held_in_training():
    network = small_network("random:timm:test_resnet", 64).train()
    before = state_hash(network.backbone)
    assert not any(module.training for module in network.backbone.modules())
    network(network.maps(torch.randn(2, 3, 64, 64))[0], [Prompt((0.0, 0.0, 9.0, 9.0))] * 2).sum().backward()
    assert state_hash(network.backbone) == before
    assert all(parameter.grad is None for parameter in network.prompt_encoder.parameters())
    assert all(parameter.grad is None for parameter in network.backbone.parameters())
    assert any(parameter.grad is not None for parameter in network.neck.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drive", "mmwhs_ct", "prostate_sites"])
def test_run_task__points_and_boxes_on_pictures_and_volumes(name, tmp_path):
    make_fake(name, tmp_path / "root", 4)
    run_task(load_task(name), MODEL, tmp_path / "root", tmp_path / "out", (*QUICK, "prompts.kind=both", "prompts.points=2"))
    assert json.loads((tmp_path / "out/metrics.json").read_text())["headline"]["mean"] > 0
