"""Recorded backbones: tokens, masked tokens, and every block's patch map."""

import torch

from meddino.models.vision_transformer import VisionTransformer
from tests.reference.records import Records, part, published_config
from tests.reference.report import Item, RecordsError, absolute

TOLERANCE = 2e-5
TOKENS = ("cls_token", "register_tokens", "patch_tokens")


@torch.no_grad()
def compare_backbone(records: Records, name: str) -> list[Item]:
    """Compare one recorded backbone.

    Raises:
        RecordsError: If its file holds no case.
        RuntimeError: If the weights do not load strictly.
    """
    tensors = records.tensors(name)
    model = VisionTransformer(published_config(records.described[name]["arguments"])).eval()
    model.load_state_dict(part(tensors, "weights."))
    cases = sorted({key.split(".")[0] for key in tensors if key.startswith("case")})
    if not cases:
        raise RecordsError(f"{name}.safetensors holds no case")
    items: list[Item] = []
    for case in cases:
        recorded = part(tensors, f"{case}.")
        label = f"{name} {case}"
        plain = model(recorded["input"])
        items += [
            absolute(f"{label} {key}", getattr(plain, key), recorded[key], TOLERANCE) for key in TOKENS if key in recorded
        ]
        if "mask" in recorded:
            masked = model(recorded["input"], recorded["mask"])
            keys = [key for key in TOKENS if f"masked.{key}" in recorded]
            items += [
                absolute(f"{label} masked {key}", getattr(masked, key), recorded[f"masked.{key}"], TOLERANCE) for key in keys
            ]
        blocks = sorted(int(key.removeprefix("block")) for key in recorded if key.startswith("block"))
        if blocks:
            maps = model.get_intermediate_layers(recorded["input"], blocks)
            items += [
                absolute(f"{label} block {block}", found, recorded[f"block{block}"], TOLERANCE)
                for block, found in zip(blocks, maps, strict=True)
            ]
    return items
