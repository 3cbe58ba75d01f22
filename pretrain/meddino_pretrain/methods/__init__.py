"""Self-supervised methods, one folder each, all behind the protocol of `base`. A row here and a recipe make one usable."""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meddino_pretrain.methods.base import Method
    from meddino_pretrain.methods.config import MethodConfig


@dataclass(frozen=True)
class MethodRow:
    """Where a method's two classes lie, as "module:class".

    Attributes:
        config: Its part of a recipe; that module imports no torch.
        method: The method itself.
        bench: Module with its sizes as options of `meddino-pretrain bench`; none if empty.
    """

    config: str
    method: str
    bench: str = ""

    def config_class(self) -> "type[MethodConfig]":
        """Import the config."""
        found: type[MethodConfig] = resolve_name(self.config)
        return found


METHODS: dict[str, MethodRow] = {
    "dinov3": MethodRow(
        "meddino_pretrain.methods.dinov3.config:DINOv3Config",
        "meddino_pretrain.methods.dinov3.method:DINOv3",
        "meddino_pretrain.methods.dinov3.bench",
    ),
    "graph_matching": MethodRow(
        "meddino_pretrain.methods.graph_matching.config:GraphMatchingConfig",
        "meddino_pretrain.methods.graph_matching.method:GraphMatching",
    ),
    "joint_embedding": MethodRow(
        "meddino_pretrain.methods.joint_embedding.config:JointEmbeddingConfig",
        "meddino_pretrain.methods.joint_embedding.method:JointEmbedding",
    ),
    "masked_image": MethodRow(
        "meddino_pretrain.methods.masked_image.config:MaskedImageConfig",
        "meddino_pretrain.methods.masked_image.method:MaskedImage",
    ),
}


def method_class(config: "MethodConfig") -> "type[Method]":
    """Import the method that a config belongs to."""
    found: type[Method] = resolve_name(METHODS[config.name].method)  # type: ignore[attr-defined]
    return found
