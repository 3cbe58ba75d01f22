import pytest
import torch
from meddino_evaluation.segmentation.networks.encoders import load_encoder, widened


@pytest.mark.parametrize("model", ["random:vitnano8", "random:timm:test_resnet", "random:timm:test_vit"])
@pytest.mark.parametrize("channels", [2, 4, 5])
def test_widened__equal_channels_give_what_one_repeated_channel_gave(model, channels):
    source = load_encoder(model)
    side = 32 if "vit" in model and "timm" not in model else 160
    one = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    expected = source.backbone.tokens(one.expand(-1, 3, -1, -1)).patches
    wide = widened(source, channels)
    assert wide.contract.channels == channels
    found = wide.backbone.tokens(one.expand(-1, channels, -1, -1)).patches
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert not any(parameter.requires_grad for parameter in wide.backbone.parameters())
    assert widened(wide, channels) is wide
