"""An ONNX model with free batch size, height and width."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meddino.checkpoints.export.comparison import check_other_library
from meddino.checkpoints.export.foreign_options import ForeignOptions, need, quiet
from meddino.checkpoints.export.model import Model
from meddino.core.errors import CheckpointError
from meddino.core.files import write_text
from meddino.models.backbone import Backbone
from meddino.models.vision_transformer import VisionTransformer

ONNX_FILE = "model.onnx"
OUTPUTS = ("cls_token", "register_tokens", "patch_tokens")
# One protobuf file ends at 2 GiB; weights beyond this go into a file beside it.
MAX_INLINE_BYTES = 1 << 30


class _Graph(nn.Module):
    """The outputs that the ONNX model has, as a tuple."""

    def __init__(self, backbone: Backbone, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone, self.layers = backbone, layers
        self.has_registers = isinstance(backbone, VisionTransformer)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(images)
        maps = self.backbone.get_intermediate_layers(images, self.layers) if self.layers else []
        registers = (features.register_tokens,) if self.has_registers else ()
        return (features.cls_token, *registers, features.patch_tokens, *maps)


def export_onnx(folder: Path, model: Model, options: ForeignOptions) -> None:
    """Write model.onnx and README.md; run it in onnxruntime and compare.

    Args:
        folder: Exists and is empty.
        model: The source; the ONNX model is always float32.
        options: What to compare on, and which blocks' patch maps to give besides.

    Raises:
        CheckpointError: A block does not exist, or onnxruntime computes something else.
    """
    need(["onnx", "onnxscript", "onnxruntime"], "onnx")
    wrong = [layer for layer in options.onnx_layers if not 0 <= layer < model.depth]
    if wrong:
        raise CheckpointError(f"--onnx-layers {wrong}: this model has blocks 0 to {model.depth - 1}")
    graph = _Graph(model.backbone, options.onnx_layers).eval()
    outputs = [name for name in OUTPUTS if name != "register_tokens" or graph.has_registers]
    names = [*outputs, *(f"patch_map_{layer}" for layer in options.onnx_layers)]
    _write(folder / ONNX_FILE, graph, names, model)
    write_text(folder / "README.md", _readme(model, names))
    session = _session(folder / ONNX_FILE)
    for stored in options.slices:
        for images in (model.preprocess(stored), model.preprocess(stored[:1])):  # the batch size is free too
            found = [torch.from_numpy(np.asarray(value)) for value in session.run(names, {"images": images.numpy()})]
            with torch.no_grad():
                expected = list(graph(images))
            check_other_library(expected, found, "onnxruntime", f"outputs at {list(stored.shape[-2:])} px")


def _write(path: Path, graph: _Graph, names: list[str], model: Model) -> None:
    patch = model.patch_size
    # Not square and not one: equal or single numbers would be taken for a rule.
    example = torch.zeros(2, model.contract.channels, 4 * patch, 6 * patch)
    limits = {"batch": 65536, "rows": 1024, "columns": 1024}
    batch, rows, columns = (torch.export.Dim(name, min=1, max=limit) for name, limit in limits.items())
    with quiet("torch.onnx", "onnxscript", "onnx_ir"):
        try:
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: batch, 2: patch * rows, 3: patch * columns},),
                input_names=["images"],
                output_names=names,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = (str(error.__cause__ or error).strip().splitlines() or ["no reason given"])[0][:200]
            name = model.config.architecture.name
            raise CheckpointError(f"{name} cannot be written as ONNX with free sizes: {reason}; leave onnx away") from error
    assert program is not None  # only the old exporter returns None
    size = sum(parameter.numel() * 4 for parameter in graph.parameters())
    program.save(str(path), external_data=size > MAX_INLINE_BYTES)


def _session(path: Path) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def _readme(model: Model, names: list[str]) -> str:
    contract = model.contract
    lines = [
        "# For ONNX runtimes",
        "",
        f"Input `images`: float32 [batch, {contract.channels}, rows, columns], sides multiples of {model.patch_size}; from",
        f"{contract.in_words}. Batch, rows and columns are free.",
        "",
        f"Outputs: {', '.join(f'`{name}`' for name in names)};",
        f"tokens are [batch, tokens, {model.embed_dim}], maps [batch, {model.embed_dim}, h, w].",
        "",
        "```python",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{ONNX_FILE}")',
        'cls_token, = session.run(["cls_token"], {"images": images})',
        "```",
        "",
        "Licence and lineage: ../MODEL_CARD.md.",
    ]
    return "\n".join(lines) + "\n"
