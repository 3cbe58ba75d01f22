import pytest
import torch
from meddino_evaluation.adaptation.fitting import FreezeCheck
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.detection.config import DetectorConfig, EncoderConfig
from meddino_evaluation.detection.network import build_detector

from meddino.core.errors import ConfigError

SMALL = {"pyramid_channels": 8, "box_head_width": 16}
TARGETS = [
    {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},  # an image without a box
]


def build(model, mode="finetune", name="faster_rcnn", size=64):
    backbone = load_backbone(model)
    return build_detector(backbone, EncoderConfig(mode=mode), DetectorConfig(name=name, **SMALL), 2, size, 0), backbone


def images(backbone, size=64):
    return list(torch.rand(2, backbone.contract.channels, size, size, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("model", "name", "strides"),
    [
        ("random:timm:resnet10t", "faster_rcnn", [4, 8, 16, 32, 64]),
        ("random:timm:resnet10t", "retinanet", [8, 16, 32, 64, 128]),
        ("random:vitnano8", "faster_rcnn", [2, 4, 8, 16, 32]),
        ("random:vitnano8", "retinanet", [4, 8, 16, 32, 64]),
    ],
)
def test_build_detector__levels_of_a_resnet_and_a_simple_pyramid_of_a_vit(model, name, strides):
    detector, backbone = build(model, name=name)
    assert detector.backbone.strides == strides
    detector.train()
    losses = detector(images(backbone), TARGETS)
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert any(parameter.grad is not None for parameter in backbone.parameters())
    assert len(detector.eval()(images(backbone))) == 2


def test_build_detector__a_patch_of_14_px_is_brought_to_strides_that_are_powers_of_two():
    detector, _ = build("random:dinov2_vits14", size=224)
    assert detector.backbone.strides == [4, 8, 16, 32, 64]
    with pytest.raises(ConfigError, match="multiple of 224"):
        build("random:dinov2_vits14", size=448 + 14)


def test_build_detector__a_size_without_whole_cells_is_refused():
    with pytest.raises(ConfigError, match="64 or 96"):
        build("random:vitnano8", size=72)


@pytest.mark.parametrize("model", ["random:timm:resnet10t", "random:vitnano8"])
def test_frozen__nothing_of_the_backbone_moves_batch_norms_included(model):
    detector, backbone = build(model, mode="frozen")
    before = backbone.hash()
    check = FreezeCheck(backbone, {"pyramid": detector.backbone.neck}, all_buffers=True)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2, weight_decay=0.1)
    detector.train()
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack(list(detector(images(backbone), TARGETS).values())).sum().backward()
        optimizer.step()
    assert backbone.hash() == before
    check.check("frozen")
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_finetune__weights_learn_and_the_statistics_of_batch_norms_stay():
    detector, backbone = build("random:timm:resnet10t")
    buffers = {name: value.clone() for name, value in backbone.named_buffers()}
    check = FreezeCheck(backbone, {"encoder": backbone}, all_buffers=True)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    detector.train()
    torch.stack(list(detector(images(backbone), TARGETS).values())).sum().backward()
    optimizer.step()
    check.check("finetune")
    assert buffers
    assert all(torch.equal(value, dict(backbone.named_buffers())[name]) for name, value in buffers.items())


def test_detector__images_are_taken_as_they_come():
    detector, backbone = build("random:vitnano8")
    given = images(backbone)
    batch, _ = detector.eval().transform([one.clone() for one in given])
    assert torch.equal(batch.tensors, torch.stack(given))  # nothing is resized or normalised a second time
