import numpy as np
import pytest
import torch
from meddino_evaluation.segmentation.training.losses import class_loss, region_loss, soft_dice_loss


def slow_loss(logits, labels, dice_weight, ce_weight):
    """Pixel by pixel, from the definitions."""
    batch, classes, rows, cols = logits.shape
    overlap, total = np.zeros(classes), np.zeros(classes)
    entropy, pixels = 0.0, 0
    for b in range(batch):
        for y in range(rows):
            for x in range(cols):
                if labels[b, y, x] == -1:
                    continue
                values = np.exp(logits[b, :, y, x] - logits[b, :, y, x].max())
                p = values / values.sum()
                entropy -= np.log(p[labels[b, y, x]])
                pixels += 1
                for k in range(classes):
                    hit = float(labels[b, y, x] == k)
                    overlap[k] += p[k] * hit
                    total[k] += p[k] + hit
    dice = np.mean([(2 * overlap[k] + 1e-5) / (total[k] + 1e-5) for k in range(1, classes)])
    return dice_weight * (1 - dice) + ce_weight * entropy / max(pixels, 1)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_class_loss__equals_slow_loop(weights):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 4, 5, 6)), rng.integers(-1, 4, (2, 5, 6))
    found = class_loss(torch.from_numpy(logits).float(), torch.from_numpy(labels), *weights)
    assert float(found) == pytest.approx(slow_loss(logits, labels, *weights), abs=1e-5)


def test_class_loss__equals_monai():
    from monai.losses import DiceCELoss

    logits, labels = torch.randn(3, 4, 8, 8), torch.randint(0, 4, (3, 8, 8))
    theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)(
        logits, labels[:, None]
    )
    assert float(class_loss(logits, labels, 1.0, 1.0)) == pytest.approx(float(theirs), abs=1e-5)


def test_class_loss__everything_ignored_is_finite_and_still():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = class_loss(logits, torch.full((1, 4, 4), -1), 1.0, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert float(logits.grad.abs().max()) == 0


def test_region_loss__overlapping_regions_and_ignored_pixels():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 2, 4, 4), (torch.rand(2, 2, 4, 4) > 0.5).float()
    counted = torch.ones(2, 1, 4, 4)
    counted[:, :, 0] = 0
    found = region_loss(logits, targets, counted, 1.0, 1.0)
    kept_logits, kept_targets = logits[:, :, 1:], targets[:, :, 1:]
    bce = torch.nn.functional.binary_cross_entropy_with_logits(kept_logits, kept_targets)
    dice = soft_dice_loss(kept_logits.sigmoid(), kept_targets, torch.ones(2, 1, 3, 4))
    assert float(found) == pytest.approx(float(bce + dice), abs=1e-5)
