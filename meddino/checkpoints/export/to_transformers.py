"""A folder that transformers loads: `AutoModel.from_pretrained(dir)` and `AutoImageProcessor.from_pretrained(dir)`."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from meddino.checkpoints.export.comparison import all_tokens, check_other_library
from meddino.checkpoints.export.foreign_options import ForeignOptions, need
from meddino.checkpoints.export.model import Model
from meddino.checkpoints.export.model_folder import WEIGHTS_FILE, write_weights
from meddino.checkpoints.weights.key_formats import to_transformers
from meddino.core.errors import CheckpointError
from meddino.core.files import write_json, write_text
from meddino.data.intensity import MEMBERS
from meddino.layers.feed_forward import SWIGLU_MULTIPLES
from meddino.models.vision_transformer import VisionTransformer, ViTConfig

PROCESSOR_MODULE = "image_processing_meddino"
PROCESSOR_CLASS = "MedDINOImageProcessor"


def export_transformers(folder: Path, model: Model, options: ForeignOptions) -> None:
    """Write config.json, model.safetensors and the image processor; load them with transformers and compare.

    Args:
        folder: Exists and is empty.
        model: The source.
        options: What to compare on, and the data type.

    Raises:
        CheckpointError: transformers' model cannot hold the architecture, or computes something else.
    """
    need(["transformers"], "hf")
    if not isinstance(model.backbone, VisionTransformer):
        raise CheckpointError(f"transformers has no {model.config.architecture.name}; export to timm or onnx instead")
    tensors = to_transformers(model.backbone.state_dict(), model.backbone.config)
    write_weights(folder / WEIGHTS_FILE, {key: tensor.to(options.dtype) for key, tensor in tensors.items()})
    dtype = str(options.dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**transformers_config(model.backbone.config), "torch_dtype": dtype})
    write_json(folder / "preprocessor_config.json", _processor_config(model))
    source = Path(__file__).with_name(f"{PROCESSOR_MODULE}.py").read_text(encoding="utf-8")
    write_text(folder / f"{PROCESSOR_MODULE}.py", source)
    write_text(folder / "README.md", _readme(model))
    with _quiet():
        _check(folder, model, options)


def transformers_config(vit: ViTConfig) -> dict[str, Any]:
    """Return an architecture as transformers' config.json of a DINOv3 ViT."""
    gated = vit.ffn_layer != "mlp"
    hidden = int(vit.embed_dim * vit.ffn_ratio)
    if gated:
        multiple = SWIGLU_MULTIPLES[vit.ffn_layer]
        hidden = -(-int(hidden * 2 / 3) // multiple) * multiple
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "intermediate_size": hidden,
        "hidden_act": "silu" if gated else "gelu",
        "use_gated_mlp": gated,
        "patch_size": vit.patch_size,
        "num_channels": vit.in_chans,
        "num_register_tokens": vit.num_registers,
        "query_bias": vit.qkv_bias,
        "value_bias": vit.qkv_bias,
        "key_bias": vit.qkv_bias and not vit.mask_k_bias,
        "proj_bias": True,
        "mlp_bias": True,
        "layer_norm_eps": vit.norm_eps,
        "layerscale_value": 1.0 if vit.layerscale_init is None else vit.layerscale_init,
        "rope_theta": vit.rope_base,
        "drop_path_rate": 0.0,
        "image_size": 16 * vit.patch_size,
        "pos_embed_shift": vit.rope_shift,
        "pos_embed_jitter": vit.rope_jitter,
        "pos_embed_rescale": vit.rope_rescale,
    }


def _processor_config(model: Model) -> dict[str, Any]:
    contract = model.contract
    return {
        # Found without running code from the folder: normalises values that are clipped and repeated already.
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "do_rescale": False,
        "do_normalize": True,
        "image_mean": list(contract.channel_mean),
        "image_std": list(contract.channel_std),
        # With trust_remote_code=True: the whole contract, from stored values.
        "auto_map": {"AutoImageProcessor": f"{PROCESSOR_MODULE}.{PROCESSOR_CLASS}"},
        "modality": contract.modality,
        "shown_range": list(contract.shown_range),
        "channels": contract.channels,
    }


def _check(folder: Path, model: Model, options: ForeignOptions) -> None:
    from transformers import AutoImageProcessor, AutoModel

    loaded, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if problems:
        raise CheckpointError(f"transformers did not load the export completely: {problems}; nothing was written")
    loaded.eval()
    plain = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    whole = _own_processor(folder)
    contract = model.contract
    for stored in options.slices:
        size = f"{list(stored.shape[-2:])} px"
        images = model.preprocess(stored)
        clipped = stored.clamp(*contract.shown_range)[:, None].repeat(1, contract.channels, 1, 1)
        for processor, given in ((plain, clipped), (whole, stored)):
            pixels = processor(list(given.numpy()), return_tensors="pt")["pixel_values"]
            check_other_library([images], [pixels], "transformers", f"preprocessed images at {size}")
        with torch.no_grad():
            found = loaded(pixel_values=images).last_hidden_state
        check_other_library([all_tokens(model, images)], [found], "transformers", f"tokens at {size}")


def _own_processor(folder: Path) -> Any:
    # Imported from the folder just written, without transformers' cache of foreign code.
    name = f"_meddino_export_{PROCESSOR_MODULE}"
    spec = importlib.util.spec_from_file_location(name, folder / f"{PROCESSOR_MODULE}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    previous, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = previous
    return getattr(module, PROCESSOR_CLASS).from_pretrained(folder, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _readme(model: Model) -> str:
    contract = model.contract
    lines = [
        "# For transformers (>= 4.56)",
        "",
        "```python",
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        'model = AutoModel.from_pretrained("this/folder")',
        'processor = AutoImageProcessor.from_pretrained("this/folder", trust_remote_code=True)',
        'pixels = processor([stored], return_tensors="pt")["pixel_values"]',
        "tokens = model(pixel_values=pixels).last_hidden_state            # CLS, registers, patches",
        "```",
        "",
        f"`stored` is [rows, columns]: {MEMBERS[contract.modality].given}.",
        "Without `trust_remote_code` the processor is transformers' own and only normalises: clip to "
        f"{list(contract.shown_range)} and repeat to [{contract.channels}, rows, columns] yourself. The code that",
        f"`trust_remote_code` runs is `{PROCESSOR_MODULE}.py` here, some twenty lines. Licence and lineage: ../MODEL_CARD.md.",
    ]
    return "\n".join(lines) + "\n"
