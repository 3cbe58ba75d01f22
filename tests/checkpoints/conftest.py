"""Stand-ins: a training checkpoint and a run as the trainer writes them, with small random weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from meddino.checkpoints.state.names import checkpoint_name
from meddino.checkpoints.state.training_state import save_training_state
from meddino.data.intensity import CTIntensity
from meddino.layers.projection_head import ProjectionHead
from meddino.models.vision_transformer import VisionTransformer, ViTConfig

SMALL = ViTConfig(embed_dim=32, depth=4, num_heads=2, patch_size=8, num_registers=4, rope_rescale=2.0, drop_path=0.1)


def lively(module: nn.Module, seed: int) -> nn.Module:
    """Fill a module with weights under which every part matters (LayerScale of 1e-5 hides what the blocks do)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def network(config: ViTConfig, seed: int) -> nn.ModuleDict:
    parts = {"backbone": VisionTransformer(config)}
    parts |= {
        head: ProjectionHead(config.embed_dim, 24, hidden_dim=16, bottleneck_dim=8) for head in ("dino_head", "ibot_head")
    }
    network = nn.ModuleDict(parts)
    lively(network, seed)
    return network


def meta_of(config: ViTConfig, step: int, stages: list[str], planned: int) -> dict:
    chain = [{"stage": name, "steps": 5} for name in stages]
    chain[-1]["steps"] = planned
    return {
        "step": step,
        "stage": stages[-1],
        "backbone": {"name": "small", **config.model_dump(mode="json")},
        "input_contract": CTIntensity(hu_min=-900.0).model_dump(mode="json"),
        "corpus_hash": "abc123",
        "lineage": {
            "stages": chain,
            "parent": {"name": "dinov3_vitb16", "sha256": None, "licence": "DINOv3 License"},
            "data": [{"dataset": "phantom", "licence": "Apache-2.0", "volumes": 3}],
            "resolutions_px_seen": [64, 96],
        },
    }


@pytest.fixture
def small_config() -> ViTConfig:
    """The architecture of `make_checkpoint`."""
    return SMALL


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write `<run>/<stage>/checkpoints/step-*` and return its folder."""

    def make(*stages, step=5, planned=5, seed=0, config=SMALL, run="run") -> Path:
        stages = stages or ("stage1_pretrain",)
        folder = tmp_path / run / stages[-1] / "checkpoints" / checkpoint_name(step)
        state = {"student": network(config, seed + 100), "teacher": network(config, seed)}
        return save_training_state(folder, state, meta_of(config, step, list(stages), planned))

    return make
