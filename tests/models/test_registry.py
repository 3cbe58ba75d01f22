"""Backbones by name."""

import pytest
import torch

from meddino.core.errors import ConfigError
from meddino.models.registry import BACKBONES, backbone_config, build_backbone, tapped_blocks
from meddino.models.vision_transformer import VisionTransformer

# Parameters in millions, as the DINOv3 paper and model cards round them.
MILLIONS = {"vits16": 21, "vits16plus": 29, "vitb16": 86, "vitl16": 300, "vith16plus": 840, "vit7b16": 6716}


@pytest.mark.parametrize("name", MILLIONS)
def test_backbones__parameter_counts(name):
    with torch.device("meta"):
        model = VisionTransformer(BACKBONES[name])
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(MILLIONS[name], rel=0.03)


def test_build_backbone__changes():
    model = build_backbone("vitnano8", drop_path=0.1, in_chans=1)
    assert model.config.drop_path == 0.1
    assert model(torch.zeros(1, 1, 16, 16)).patch_tokens.shape == (1, 4, 128)


def test_backbone_config__unknown_names():
    with pytest.raises(ConfigError, match="unknown backbone 'vitb14'; did you mean 'vitb16'"):
        backbone_config("vitb14")
    with pytest.raises(ConfigError, match="unknown key 'drop_paths'; did you mean 'drop_path'"):
        backbone_config("vits16", drop_paths=0.1)


@pytest.mark.parametrize(
    ("depth", "count", "blocks"),
    [(12, 4, (2, 5, 8, 11)), (4, 4, (0, 1, 2, 3)), (24, 4, (5, 11, 17, 23)), (3, 1, (2,)), (40, 4, (9, 19, 29, 39))],
)
def test_tapped_blocks__evenly_spaced(depth, count, blocks):
    assert tapped_blocks(depth, count) == blocks


def test_tapped_blocks__too_many():
    with pytest.raises(ValueError, match="between 1 and 3"):
        tapped_blocks(3, 4)
