"""Cosine similarity of one patch to all others: as pictures, and as a page in which a click on a patch shows its map."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from meddino.core import html
from meddino.core.errors import ConfigError
from meddino.core.html_charts import png
from meddino.data.intensity import Window, window_text
from meddino.data.model_input import is_foreground, to_picture
from meddino.models.patch_maps import cosine_map, patch_pca_images, share_of_patch
from meddino_evaluation.adaptation.features import Transform, model_input
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.classification.images import SliceStack

MAX_SIZE_PX = 2048
_PAGE_DIMS = 128
_SHOWN_PX = 640
_WINDOWS: tuple[Window, ...] = ("soft_tissue", "lung", "bone")
_SHOWN_HU = (-1350.0, 1300.0)  # all that any of them tells apart; clipped before resizing, so that metal smears over nothing


@dataclass(frozen=True)
class PatchMap:
    """Patch tokens of one image.

    Attributes:
        tokens: [D, h, w] of the last block.
        picture: uint8 [size, size] for people: CT in the soft-tissue window, else what the model saw.
        patch_px: Pixels of a patch.
        windows: Of CT the picture in each window, by what the window is called.
        body: [h, w], True where a patch shows more than air or darkness; None counts all.
    """

    tokens: Float[Tensor, "dim h w"]
    picture: NDArray[np.uint8]
    patch_px: int
    windows: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    body: Bool[Tensor, "h w"] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return int(self.tokens.shape[1]), int(self.tokens.shape[2])


def patch_map(backbone: Backbone, stack: SliceStack, number: int, size_px: int) -> PatchMap:
    """Compute the patch tokens of one slice.

    Args:
        backbone: Any.
        stack: The image or volume.
        number: Which slice.
        size_px: Side the slice is resized to, up to 2048.

    Raises:
        ConfigError: There is no such slice, or the size does not fit.
    """
    if not 0 <= number < len(stack.values):
        raise ConfigError(f"slice {number} asked for; the image has slices 0 to {len(stack.values) - 1}")
    if size_px > MAX_SIZE_PX:
        raise ConfigError(f"size {size_px} px; maps go up to {MAX_SIZE_PX}")
    backbone.contract.check_size(size_px, backbone.name)
    transform = Transform(size_px, "ct" if stack.kind == "hu" else "image", None, None, 1)
    images = model_input(backbone, stack, [number], transform)
    with torch.no_grad():
        tokens = backbone.tokens(images).patches[0]
    grey = images[0].mean(0)
    low, high = torch.quantile(grey.flatten()[:: max(1, grey.numel() // 10**6)], torch.tensor([0.01, 0.99]))
    unit = ((grey - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    if stack.kind != "hu":
        body = share_of_patch(is_foreground(unit, "image"), backbone.patch_size) >= 0.5
        return PatchMap(tokens.float(), (unit * 255).round().to(torch.uint8).numpy(), backbone.patch_size, {}, body)
    hu = functional.interpolate(
        stack.tensor(number, number + 1).mean(1, keepdim=True).clamp(*_SHOWN_HU),
        size=(size_px, size_px),
        mode="bilinear",
        antialias=True,
    )[0, 0]
    windows = {window_text(name): to_picture(hu, "ct", window=name).numpy() for name in _WINDOWS}
    body = share_of_patch(is_foreground(hu, "ct"), backbone.patch_size) >= 0.5
    return PatchMap(tokens.float(), next(iter(windows.values())), backbone.patch_size, windows, body)


def similarity_map(patches: PatchMap, row: int, column: int) -> Float[Tensor, "h w"]:
    """Return the cosine similarity of every patch to one.

    Raises:
        ConfigError: There is no such patch.
    """
    rows, columns = patches.grid
    if not (0 <= row < rows and 0 <= column < columns):
        raise ConfigError(f"patch {row},{column} asked for; rows go from 0 to {rows - 1}, columns from 0 to {columns - 1}")
    return cosine_map(patches.tokens, row, column)


def similarity_picture(patches: PatchMap, row: int, column: int) -> NDArray[np.uint8]:
    """Return the map as an RGB picture of the image's size, the chosen patch framed in red."""
    from matplotlib import colormaps

    values = similarity_map(patches, row, column)
    unit = ((values - values.min()) / (values.max() - values.min()).clamp(min=1e-6)).numpy()
    coloured = (colormaps["viridis"](unit)[..., :3] * 255).round().astype(np.uint8)
    side = patches.patch_px
    big = np.repeat(np.repeat(coloured, side, axis=0), side, axis=1)
    frame = max(1, side // 8)
    top, left = row * side, column * side
    cell = big[top : top + side, left : left + side].copy()
    big[top : top + side, left : left + side] = (255, 40, 40)
    big[top + frame : top + side - frame, left + frame : left + side - frame] = cell[frame : side - frame, frame : side - frame]
    return big


def pca_picture(patches: PatchMap) -> NDArray[np.uint8]:
    """Return the first three principal components of the body's patch tokens as colours, at the image's size."""
    body = None if patches.body is None else [patches.body]
    return patch_pca_images([patches.tokens], upscale=patches.patch_px, masks=body)[0]


def similarity_page(patches: PatchMap, title: str, row: int, column: int, note: str = "") -> str:
    """Return one self-contained page: image, PCA, and a map that follows the mouse's click.

    Tokens wider than 128 are projected on their 128 leading singular directions; the page says how much that changes.

    Args:
        patches: Of one image.
        title: Heading.
        row: Patch shown first.
        column: Of the patch shown first.
        note: What limits what is shown; "" where nothing does.
    """
    rows, columns = patches.grid
    unit = functional.normalize(patches.tokens, dim=0).flatten(1).T  # [N, D]
    shown = _compressed(unit)
    exact = similarity_map(patches, row, column).flatten()
    approximate = shown @ shown[row * columns + column]
    difference = float((exact - approximate).abs().max())
    scale = float(shown.abs().max())
    quantised = (shown / scale * 32767).round().to(torch.int16).numpy().astype("<i2")
    data = {
        "rows": rows,
        "columns": columns,
        "dims": int(shown.shape[1]),
        "scale": scale / 32767,
        "row": row,
        "column": column,
        "tokens": base64.b64encode(quantised.tobytes()).decode(),
    }
    views = patches.windows or {"what the model saw, from its 1st to its 99th percentile": patches.picture}
    pictures = {name: "data:image/png;base64," + base64.b64encode(png(_small(one))).decode() for name, one in views.items()}
    options = Markup("").join(
        Markup('<option value="{}">{}</option>').format(source, name) for name, source in pictures.items()
    )
    body = Markup(_VIEWER).format(
        options=options,
        picture=next(iter(pictures.values())),
        width=_SHOWN_PX,
        height=round(_SHOWN_PX * rows / columns),
        data=Markup(json.dumps(data)),  # numbers and base64 only: nothing of the user's text is in it
        script=Markup(_SCRIPT),
    )
    first = next(iter(views))
    pair = [(png(_small(patches.picture)), first), (png(_small(pca_picture(patches))), "first three components, body only")]
    words = "The first three principal components of the patch tokens as red, green and blue, over the body's patches."
    sections = [
        html.Section("Similarity to the chosen patch", html.join(*([html.text(note, "warning")] if note else []), body)),
        html.Section("Principal components", html.join(html.text(words), html.picture_row(pair, width_px=_SHOWN_PX))),
    ]
    lead = f"{rows} x {columns} patches of {patches.patch_px} px; click on one. Off the exact map by at most {difference:.4f}"
    return html.page(title, lead, sections)


def _compressed(unit: Tensor) -> Tensor:
    if unit.shape[1] <= _PAGE_DIMS:
        return unit
    # Dot products survive best along the leading singular directions (no centring: it would change the cosine).
    vectors: Tensor = torch.linalg.eigh((unit.T @ unit).double()).eigenvectors
    return unit @ vectors[:, -_PAGE_DIMS:].float()


def _small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if picture.shape[0] <= _SHOWN_PX:
        return picture
    side = (_SHOWN_PX, round(_SHOWN_PX * picture.shape[0] / picture.shape[1]))
    return np.asarray(Image.fromarray(picture).resize(side))


_VIEWER = """<div class="row" style="grid-template-columns: repeat(2, minmax(0, 1fr)); max-width: 1300px">
<canvas id="image" width="{width}" height="{height}" style="cursor:crosshair;width:100%"></canvas>
<canvas id="map" width="{width}" height="{height}" style="cursor:crosshair;width:100%"></canvas></div>
<p id="readout">waiting</p>
<p>Map: dark is least alike, yellow most, over this picture; the red frame is the chosen patch.</p>
<p><label>Shown in <select id="window">{options}</select></label>
<label>Map over the picture <input id="opacity" type="range" min="0" max="100" value="0"></label></p>
<img id="source" alt="the image" hidden src="{picture}">
<script type="application/json" id="tokens">{data}</script>
<script>{script}</script>"""

_SCRIPT = """
(function () {
  const data = JSON.parse(document.getElementById("tokens").textContent);
  const bytes = Uint8Array.from(atob(data.tokens), c => c.charCodeAt(0));
  const tokens = new Int16Array(bytes.buffer);
  const image = document.getElementById("image"), map = document.getElementById("map");
  const source = document.getElementById("source"), slider = document.getElementById("opacity");
  const small = document.createElement("canvas");
  small.width = data.columns; small.height = data.rows;
  let row = data.row, column = data.column;
  function similarities() {
    const k = data.dims, start = (row * data.columns + column) * k, out = new Float32Array(data.rows * data.columns);
    const factor = data.scale * data.scale;
    for (let n = 0; n < out.length; n++) {
      let sum = 0;
      for (let d = 0; d < k; d++) sum += tokens[n * k + d] * tokens[start + d];
      out[n] = sum * factor;
    }
    return out;
  }
  function frame(canvas) {
    const pen = canvas.getContext("2d"), w = canvas.width / data.columns, h = canvas.height / data.rows;
    pen.strokeStyle = "#ff2828"; pen.lineWidth = 2; pen.strokeRect(column * w, row * h, w, h);
  }
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  function colour(unit) {
    const place = Math.min(3.9999, Math.max(0, unit) * 4), low = Math.floor(place), part = place - low;
    return stops[low].map((value, i) => value + (stops[low + 1][i] - value) * part);
  }
  function draw() {
    const values = similarities();
    let low = Infinity, high = -Infinity, sum = 0;
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); sum += value; }
    const pen = small.getContext("2d"), pixels = pen.createImageData(small.width, small.height);
    for (let n = 0; n < values.length; n++) {
      const c = colour((values[n] - low) / Math.max(1e-6, high - low));
      pixels.data.set([c[0], c[1], c[2], 255], n * 4);
    }
    pen.putImageData(pixels, 0, 0);
    const right = map.getContext("2d"), left = image.getContext("2d");
    right.imageSmoothingEnabled = false; left.imageSmoothingEnabled = false;
    right.drawImage(small, 0, 0, map.width, map.height);
    left.globalAlpha = 1; left.drawImage(source, 0, 0, image.width, image.height);
    left.globalAlpha = slider.value / 100; left.drawImage(small, 0, 0, image.width, image.height); left.globalAlpha = 1;
    frame(image); frame(map);
    document.getElementById("readout").textContent = "patch " + row + "," + column + ": similarity from " + low.toFixed(3) +
      " to " + high.toFixed(3) + ", mean " + (sum / values.length).toFixed(3);
  }
  function choose(event) {
    const box = event.target.getBoundingClientRect();
    column = Math.min(data.columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * data.columns)));
    row = Math.min(data.rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * data.rows)));
    draw();
  }
  image.addEventListener("click", choose); map.addEventListener("click", choose); slider.addEventListener("input", draw);
  const chosen = document.getElementById("window");
  chosen.addEventListener("change", () => { source.src = chosen.value; });
  source.addEventListener("load", draw);
  if (source.complete) draw();
})();
"""
