"""SAM's files, under segment-anything's names and under transformers': all of them is loaded, and gives what SAM gives."""

import re
from dataclasses import replace

import pytest
import torch
from meddino_evaluation.backbones.adapter import state_hash
from meddino_evaluation.backbones.catalogue import CATALOGUE
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.prompts.config import DecoderConfig
from meddino_evaluation.prompts.drawing import Prompt
from meddino_evaluation.prompts.network import PromptNetwork
from safetensors.torch import save_file

from meddino.core.errors import CheckpointError

DECODER = DecoderConfig(mlp_dim=32, layers=2)
PAIR = ("weight", "bias")


def names(stem, ends=PAIR):
    return {f"{stem}.{end}" for end in ends}


def original_names(blocks):
    """Return every name in a file of segment-anything, written down from its modules (Apache-2.0)."""
    found = {"image_encoder.pos_embed", "image_encoder.neck.0.weight", "image_encoder.neck.2.weight"}
    found |= names("image_encoder.patch_embed.proj") | names("image_encoder.neck.1") | names("image_encoder.neck.3")
    for block in range(blocks):
        own = f"image_encoder.blocks.{block}"
        found |= {f"{own}.attn.rel_pos_h", f"{own}.attn.rel_pos_w"}
        found |= {
            name
            for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
            for name in names(f"{own}.{part}")
        }
    found |= {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"}
    found |= {f"prompt_encoder.point_embeddings.{place}.weight" for place in range(4)}
    found |= {"prompt_encoder.not_a_point_embed.weight", "prompt_encoder.no_mask_embed.weight"}
    found |= {name for place in (0, 1, 3, 4, 6) for name in names(f"prompt_encoder.mask_downscaling.{place}")}
    found |= {"mask_decoder.iou_token.weight", "mask_decoder.mask_tokens.weight"}
    attention = [f"{part}_proj" for part in ("q", "k", "v", "out")]
    two_way = "mask_decoder.transformer"
    for layer in range(2):
        own = f"{two_way}.layers.{layer}"
        parts = [f"norm{number}" for number in (1, 2, 3, 4)] + ["mlp.lin1", "mlp.lin2"]
        for kind in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            parts += [f"{kind}.{part}" for part in attention]
        found |= {name for part in parts for name in names(f"{own}.{part}")}
    found |= {name for part in attention for name in names(f"{two_way}.final_attn_token_to_image.{part}")}
    found |= names(f"{two_way}.norm_final_attn")
    found |= {name for place in (0, 1, 3) for name in names(f"mask_decoder.output_upscaling.{place}")}
    for mlp in ("iou_prediction_head", *(f"output_hypernetworks_mlps.{token}" for token in range(4))):
        found |= {name for layer in range(3) for name in names(f"mask_decoder.{mlp}.layers.{layer}")}
    return found


BY_TRANSFORMERS = {
    "vision_encoder.layers": "image_encoder.blocks",
    "vision_encoder.patch_embed.projection": "image_encoder.patch_embed.proj",
    "vision_encoder.neck.conv1": "image_encoder.neck.0",
    "vision_encoder.neck.layer_norm1": "image_encoder.neck.1",
    "vision_encoder.neck.conv2": "image_encoder.neck.2",
    "vision_encoder.neck.layer_norm2": "image_encoder.neck.3",
    "vision_encoder": "image_encoder",
    "shared_image_embedding.positional_embedding": "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "prompt_encoder.point_embed": "prompt_encoder.point_embeddings",
    "prompt_encoder.mask_embed.conv1": "prompt_encoder.mask_downscaling.0",
    "prompt_encoder.mask_embed.layer_norm1": "prompt_encoder.mask_downscaling.1",
    "prompt_encoder.mask_embed.conv2": "prompt_encoder.mask_downscaling.3",
    "prompt_encoder.mask_embed.layer_norm2": "prompt_encoder.mask_downscaling.4",
    "prompt_encoder.mask_embed.conv3": "prompt_encoder.mask_downscaling.6",
    "mask_decoder.upscale_conv1": "mask_decoder.output_upscaling.0",
    "mask_decoder.upscale_layer_norm": "mask_decoder.output_upscaling.1",
    "mask_decoder.upscale_conv2": "mask_decoder.output_upscaling.3",
}
"""Beginning of a name, by transformers and by segment-anything; the longest that fits counts."""


def original_name(name):
    start = max((one for one in BY_TRANSFORMERS if name == one or name.startswith(f"{one}.")), key=len, default="")
    name = BY_TRANSFORMERS.get(start, "") + name.removeprefix(start)
    name = re.sub(r"\.layer_norm(\d|_final_attn)", r".norm\1", name)
    if "_mlps." in name or "iou_prediction_head" in name:
        for theirs, own in (("layers.0.", "layers.1."), ("proj_in.", "layers.0."), ("proj_out.", "layers.2.")):
            if f".{theirs}" in name:
                return name.replace(f".{theirs}", f".{own}")
    return name


@pytest.fixture
def sam(monkeypatch):
    """transformers' SAM, tiny, every parameter drawn; the catalogue's SAM is as small."""
    from transformers import SamConfig, SamModel

    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "global_attn_indexes": (1,)}
    for name in ("sam_vitb16", "medsam_vitb16"):
        monkeypatch.setitem(CATALOGUE, name, replace(CATALOGUE[name], arguments=small))
    image = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 128, "image_size": 64}
    model = SamModel(
        SamConfig(
            vision_config={**image, "global_attn_indexes": [1], "patch_size": 16},
            prompt_encoder_config={"image_size": 64, "patch_size": 16},
            mask_decoder_config={"mlp_dim": DECODER.mlp_dim, "num_hidden_layers": DECODER.layers},
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def original_state(sam):
    """Return a state under segment-anything's names, each tensor once."""
    state = {
        name: value
        for name, value in sam.state_dict().items()
        if name != "prompt_encoder.shared_embedding.positional_embedding"
    }
    return {original_name(name): value for name, value in state.items()}


def written(sam, kind, folder):
    if kind == "transformers":
        sam.save_pretrained(folder / "hf")
        return folder / "hf/model.safetensors"
    state = original_state(sam)
    assert state.keys() == original_names(blocks=2)
    path = folder / ("sam.safetensors" if kind == "safetensors" else "sam.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({f"module.{name}": value for name, value in state.items()} if kind == "parallel" else state, path)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sam_vitb16", "torch"), ("sam_vitb16", "safetensors"), ("sam_vitb16", "transformers"), ("medsam_vitb16", "parallel")],
)
def test_sam_file__encoder_prompts_and_decoder_give_what_sam_gives(sam, name, kind, tmp_path):
    path = written(sam, kind, tmp_path)
    backbone = load_backbone(f"{name}@{path}")
    network = PromptNetwork(backbone, backbone.contract, 64, DECODER.model_copy(update={"weights": str(path)}), 0).eval()
    assert list(network.parts) == ["mask_decoder"]  # the neck is SAM's own
    assert state_hash(network.mask_decoder) == state_hash(sam.mask_decoder)
    assert state_hash(network.prompt_encoder) == state_hash(sam.prompt_encoder)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    boxes = [(3.0, 4.0, 20.0, 30.0), (0.0, 0.0, 63.0, 63.0)]
    with torch.no_grad():
        found = network(network.maps(pixels)[0], [Prompt(box) for box in boxes])
        masks = sam(pixel_values=pixels, input_boxes=torch.tensor(boxes)[:, None], multimask_output=False).pred_masks[:, 0]
    expected = torch.nn.functional.interpolate(masks, size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "part", ["image_encoder.blocks.1.attn.rel_pos_h", "mask_decoder.iou_token.weight", "prompt_encoder.no_mask_embed.weight"]
)
def test_sam_file__one_tensor_less_is_named(sam, part, tmp_path):
    state = original_state(sam)
    del state[part]
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match=rf"sam\.pth .*{part.split('.')[-1]}"):
        backbone = load_backbone(f"sam_vitb16@{tmp_path / 'sam.pth'}")
        PromptNetwork(backbone, backbone.contract, 64, DECODER.model_copy(update={"weights": str(tmp_path / "sam.pth")}), 0)


def test_sam_file__a_decoder_of_another_shape_is_named(sam, tmp_path):
    path = written(sam, "torch", tmp_path)
    backbone = load_backbone("random:vitnano8")
    with pytest.raises(CheckpointError, match=r"is no SAM that fits: .* mask_decoder"):
        PromptNetwork(backbone, backbone.contract, 48, DecoderConfig(mlp_dim=16, weights=str(path)), 0)


def test_sam_file__pictures_go_in_as_each_of_them_was_trained(sam):
    grey = torch.full((1, 3, 64, 64), 0.5)
    assert load_backbone("random:medsam_vitb16").contract.from_unit(grey).unique().tolist() == [0.5]
    official = (0.5 * 255 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(load_backbone("random:sam_vitb16").contract.from_unit(grey)[0, :, 0, 0], official)


class _Hostile:
    def __reduce__(self):
        return print, ("run!",)


def test_sam_file__a_pickle_is_not_run(tmp_path, capsys):
    torch.save({"mask_decoder.iou_token.weight": _Hostile()}, tmp_path / "sam.pth")
    backbone = load_backbone("random:vitnano8")
    with pytest.raises(CheckpointError, match=r"sam\.pth"):
        PromptNetwork(backbone, backbone.contract, 48, DecoderConfig(weights=str(tmp_path / "sam.pth")), 0)
    assert "run!" not in capsys.readouterr().out
