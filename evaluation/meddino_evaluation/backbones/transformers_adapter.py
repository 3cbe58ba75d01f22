"""Backbones built by transformers: MSN, and any vision transformer in a local folder."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from meddino.core.errors import CheckpointError, ConfigError
from meddino.models.registry import tapped_blocks
from meddino_evaluation.backbones.adapter import Backbone, Tokens
from meddino_evaluation.backbones.contract import ImageContract


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "this backbone is built by transformers, which is not installed: pip install 'meddino[hf]'"
        ) from error
    return transformers


def build_transformers(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a transformers model by the name of its class (e.g. ViTMSNModel) with random weights; nothing is downloaded."""
    model_class = getattr(_transformers(), architecture)
    model: nn.Module = model_class(model_class.config_class(**arguments))
    return model


def load_transformers_folder(folder: Path) -> nn.Module:
    """Load a model from a local folder with config.json and model.safetensors; nothing is downloaded, no pickle is read.

    Raises:
        CheckpointError: The folder is no such model.
    """
    try:
        model: nn.Module = _transformers().AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no transformers model that can be used: {str(error).splitlines()[0]}") from error
    return model


class TransformersBackbone(Backbone):
    """A vision transformer of transformers behind the common face."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        config: Any = model.config
        if not hasattr(config, "patch_size") or not hasattr(config, "hidden_size"):
            raise ConfigError(f"'{name}' ({type(model).__name__}) is no vision transformer with patches and a hidden size")
        self.name = name
        self.model = model
        self.embed_dim, self.patch_size = int(config.hidden_size), int(config.patch_size)
        self._prefix = 1 + int(getattr(config, "num_register_tokens", 0) or 0)
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.contract = ImageContract(multiple_px=self.patch_size, native_size_px=int(config.image_size))

    def tokens(self, images: Float[Tensor, "batch channels h w"], count: int = 1) -> Tokens:
        """See `Backbone.tokens`."""
        states, last = self._states(images)
        chosen = [*(self._norm(state) for state in states[-count:-1]), last] if count > 1 else [last]
        return Tokens(tuple(state[:, 0] for state in chosen), self._map(last, images))

    def patch_maps(self, images: Float[Tensor, "batch channels h w"], count: int = 4) -> list[Tensor]:
        """See `Backbone.patch_maps`."""
        states, last = self._states(images)
        blocks = tapped_blocks(len(states), min(count, len(states)))
        return [self._map(last if block == len(states) - 1 else self._norm(states[block]), images) for block in blocks]

    def stages(self) -> Sequence[nn.Module]:
        """See `Backbone.stages`."""
        lists = [list(module) for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len, default=[])

    def _states(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        options = {"interpolate_pos_encoding": True} if self._interpolates else {}
        output = self.model(pixel_values=images, output_hidden_states=True, **options)
        return list(output.hidden_states[1:]), output.last_hidden_state

    def _norm(self, state: Tensor) -> Tensor:
        for name in ("layernorm", "norm", "post_layernorm"):
            norm = getattr(self.model, name, None)
            if isinstance(norm, nn.Module):
                normalised: Tensor = norm(state)
                return normalised
        return state

    def _map(self, state: Tensor, images: Tensor) -> Tensor:
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        patches = state[:, self._prefix :].transpose(1, 2)
        return patches.reshape(*patches.shape[:2], *grid)
