"""Networks built by transformers: MSN, and any vision transformer in a local folder."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from meddino.core.errors import CheckpointError, ConfigError
from meddino.layers.drop_path import DropPathPlan
from meddino.models.backbone import Backbone, BackboneOutput, LayerGroup
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


class TransformersNetwork(Backbone):
    """A vision transformer of transformers behind the protocol of backbones. It is evaluated, never pretrained here.

    Raises:
        ConfigError: The model has no patches or no hidden size.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        described: Any = model.config
        if not hasattr(described, "patch_size") or not hasattr(described, "hidden_size"):
            raise ConfigError(f"'{name}' ({type(model).__name__}) is no vision transformer with patches and a hidden size")
        self.model = model
        self.embed_dim, self.patch_size = int(described.hidden_size), int(described.patch_size)
        self.multiple_px, self.depth = self.patch_size, int(described.num_hidden_layers)
        self.native_size_px = int(described.image_size)
        self._prefix = 1 + int(getattr(described, "num_register_tokens", 0) or 0)
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters

    @property
    def contract(self) -> ImageContract:
        """How images become its input: as photographs do."""
        return ImageContract(multiple_px=self.patch_size, native_size_px=self.native_size_px)

    @property
    def blocks(self) -> nn.ModuleList:
        """Its transformer blocks."""
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len, default=nn.ModuleList())

    def forward(
        self, images: Float[Tensor, "batch channels height width"], *, plan: DropPathPlan | None = None
    ) -> BackboneOutput:
        """See `Backbone.tokens`."""
        return self._output(self._run(images).last_hidden_state, images)

    def intermediate_outputs(
        self, images: Float[Tensor, "batch channels height width"], blocks: Sequence[int], *, norm: bool = True
    ) -> list[BackboneOutput]:
        """See `Backbone.intermediate_outputs`."""
        wanted, found = self.check_blocks(blocks), self._run(images)
        states = list(found.hidden_states[1:])
        if norm:
            # What stands behind the last block's norm is the library's own last state.
            states = [*map(self._norm, states[:-1]), found.last_hidden_state]
        return [self._output(states[block], images) for block in wanted]

    def get_intermediate_layers(
        self, images: Float[Tensor, "batch channels height width"], blocks: Sequence[int], *, norm: bool = True
    ) -> list[Float[Tensor, "batch _dim _rows _columns"]]:
        """See `Backbone.get_intermediate_layers`."""
        return [output.patch_map for output in self.intermediate_outputs(images, blocks, norm=norm)]

    def layer_groups(self) -> list[LayerGroup]:
        """See `Backbone.layer_groups`: all in one, as nothing here trains it by depth."""
        return [LayerGroup("network", 0, tuple(name for name, _ in self.named_parameters()))]

    def _run(self, images: Tensor) -> Any:
        options = {"interpolate_pos_encoding": True} if self._interpolates else {}
        return self.model(pixel_values=images, output_hidden_states=True, **options)

    def _norm(self, state: Tensor) -> Tensor:
        for name in ("layernorm", "norm", "post_layernorm"):
            norm = getattr(self.model, name, None)
            if isinstance(norm, nn.Module):
                normalised: Tensor = norm(state)
                return normalised
        return state

    def _output(self, state: Tensor, images: Tensor) -> BackboneOutput:
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return BackboneOutput(state[:, 0], state[:, 1 : self._prefix], state[:, self._prefix :], grid)
