"""MODEL of the command line: an export, a weights file, or random weights of a known or an exported architecture."""

from pathlib import Path

import meddino
from meddino.core.errors import CheckpointError, ConfigError
from meddino.models.registry import BACKBONES
from meddino_evaluation.segmentation.network import EncoderSource, state_hash

RANDOM = "random:"


def load_encoder(model: str, random_seed: int = 0) -> EncoderSource:
    """Load what MODEL means.

    Args:
        model: Folder of an export; a weights file; `random:<backbone>`; or `random:<export folder>`, which has the
            architecture and the input contract of that export and fresh weights.
        random_seed: Seed of fresh weights.

    Raises:
        ConfigError: Nothing of that name exists.
        CheckpointError: It exists and is damaged or of another kind.
    """
    if not model.startswith(RANDOM) and not Path(model).exists():
        raise ConfigError(
            f"--model {model}: no such folder or file; give an export folder, a weights file or random:<name> "
            f"(<name>: {', '.join(BACKBONES)}, or an export folder)"
        )
    loaded = meddino.load(model, seed=random_seed)
    backbone, contract = loaded.backbone, loaded.contract
    if backbone.config.in_chans != contract.channels:
        raise CheckpointError(
            f"model {model}: its patch embedding takes {backbone.config.in_chans} channels, its input contract says "
            f"{contract.channels}"
        )
    return EncoderSource(model, backbone.eval(), contract, state_hash(backbone), loaded.lineage.model_dump(mode="json"))
