"""MAE: the loss as a loop, the encoder on some patches alone, masks as a function of the sample, the whole step."""

import pytest
import torch
from lightly.models import utils
from meddino_pretrain.data.batches import Batch, RawBatch
from meddino_pretrain.data.sampler import BatchShare, SampleOrder
from meddino_pretrain.methods.base import StageSetting, shapes_of
from meddino_pretrain.methods.masked_image.config import DecoderConfig, MaskedImageConfig
from meddino_pretrain.methods.masked_image.method import MaskedImage
from meddino_pretrain.methods.masked_image.network import CROPS, MASKED, VISIBLE, patch_pixels, reconstruction_loss
from meddino_pretrain.schedules import StepValues

from meddino.core.device import find_machine
from meddino.core.errors import ConfigError
from meddino.models.registry import build_backbone

CONFIG = MaskedImageConfig(crop_px=32, decoder=DecoderConfig(dim=32, depth=1, heads=2))
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "layerscale_init": 1.0}


def method_of(config=CONFIG, backbone="vitnano8", batch=8, **changes):
    setting = StageSetting(4, 7, BatchShare(batch), find_machine("cpu"))
    torch.manual_seed(0)
    return MaskedImage.build(config, build_backbone(backbone, **{**TINY, **changes}), setting)


def batch_of(samples=range(8), step=0):
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    raw = RawBatch(step, 0, samples, {CROPS: images[:, 0]}, {}, [str(each) for each in samples])
    raw = MaskedImage.collate(CONFIG, 8, raw, SampleOrder(3, 100, 8))
    return Batch(step, 0, {CROPS: images[samples.start : samples.stop]}, raw.keys, extras=raw.extras)


def test_loss__is_the_mean_over_masked_patches_of_normalised_pixels():
    torch.manual_seed(0)
    images, painted = torch.randn(2, 3, 16, 24), torch.randn(2, 6, 192)
    masked = torch.tensor([[0, 4], [5, 2]])
    total = 0.0
    for image in range(2):
        for patch in masked[image].tolist():
            row, column = divmod(patch, 3)
            pixels = [
                images[image, channel, 8 * row + y, 8 * column + x].item()
                for y in range(8)
                for x in range(8)
                for channel in range(3)
            ]
            mean = sum(pixels) / 192
            variance = sum((pixel - mean) ** 2 for pixel in pixels) / 191
            target = [(pixel - mean) / (variance + 1e-6) ** 0.5 for pixel in pixels]
            total += sum((painted[image, patch, k].item() - target[k]) ** 2 for k in range(192)) / 192 / 4
    wanted = patch_pixels(images, 8)
    assert reconstruction_loss(painted, wanted, masked, True).item() == pytest.approx(total, rel=1e-5)
    square = images[..., :16]
    torch.testing.assert_close(patch_pixels(square, 8), utils.patchify(square, 8))
    plain = (painted - wanted).square().mean(-1).gather(1, masked).mean()
    assert reconstruction_loss(painted, wanted, masked, False) == plain


@pytest.mark.parametrize("lean", [True, False])
def test_backbone__all_patches_in_another_order_give_the_same_tokens(lean, monkeypatch):
    if not lean:
        monkeypatch.setattr("meddino.layers.cpu.lean_branches.is_lean", lambda *_: False)
    backbone, images = build_backbone("vitnano8", **TINY).eval(), torch.randn(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    whole, mixed = backbone(images), backbone(images, visible=order)
    torch.testing.assert_close(mixed.cls_token, whole.cls_token, rtol=1e-4, atol=1e-5)
    wanted = whole.patch_tokens.gather(1, order[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(mixed.patch_tokens, wanted, rtol=1e-4, atol=1e-5)


def test_backbone__does_not_see_what_is_left_away():
    backbone, images = build_backbone("vitnano8", **TINY).eval(), torch.randn(2, 3, 32, 32)
    visible = torch.tensor([[0, 5, 9], [2, 3, 15]])
    before = backbone(images, visible=visible)
    changed = images.clone()
    changed[0, :, :8, 8:16] = 7  # patch 1
    after = backbone(changed, visible=visible)
    assert before.patch_tokens.shape == (2, 3, 32) and torch.equal(before.patch_tokens, after.patch_tokens)
    changed[0, :, :8, :8] = 7  # patch 0
    assert not torch.equal(before.cls_token, backbone(changed, visible=visible).cls_token)


def test_masks__belong_to_the_sample_and_the_step():
    whole, part = batch_of(), batch_of(range(4, 8))
    assert torch.equal(whole.extras[VISIBLE][4:], part.extras[VISIBLE]) and whole.extras[VISIBLE].shape == (8, 4)
    together = torch.cat([whole.extras[VISIBLE], whole.extras[MASKED]], dim=1).sort(1).values
    assert torch.equal(together, torch.arange(16).expand(8, -1))
    assert not torch.equal(whole.extras[VISIBLE], batch_of(step=1).extras[VISIBLE])


def test_method__learns_what_it_is_shown():
    method, batch = method_of(), batch_of()
    optimizer, found = torch.optim.AdamW(method.model.parameters(), 5e-3), []
    for step in range(25):
        for losses in method.losses([batch], StepValues(2e-3, 0.0), step):
            optimizer.zero_grad()
            losses["total"].backward()
            found.append(losses["total"].item())
        optimizer.step()
    unused = [name for name, each in method.model.named_parameters() if each.requires_grad and each.grad is None]
    assert not unused and found[0] > 0.95 and found[-1] < 0.9 * found[0]


def test_flops__grow_with_what_is_seen():
    few = shapes_of(lambda: method_of(CONFIG.model_copy(update={"mask_ratio": 0.75}))).flops(batch_of())
    many = shapes_of(lambda: method_of(CONFIG.model_copy(update={"mask_ratio": 0.25}))).flops(batch_of())
    assert few < many < 3 * few


@pytest.mark.parametrize(
    ("config", "backbone", "changes", "words"),
    [
        (CONFIG, "timm:resnet10t", {}, "only the vision transformers.*not a TimmBackbone"),
        (CONFIG, "vitnano8", {"drop_path": 0.1}, "drop_path 0.1"),
        (CONFIG.model_copy(update={"mask_ratio": 0.99}), "vitnano8", {}, "mask_ratio 0.99 of 16 patches"),
    ],
)
def test_build__says_what_it_cannot_train(config, backbone, changes, words):
    setting = StageSetting(4, 7, BatchShare(8), find_machine("cpu"))
    with pytest.raises(ConfigError, match=words):
        MaskedImage.build(config, build_backbone(backbone, **changes), setting)
