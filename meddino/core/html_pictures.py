"""Pictures as PNG, alone and as panels beside one another that can be taken apart again."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GAP_PX = 4  # white, between panels


def png(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture [h, w] or [h, w, 3] as PNG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def beside(panels: Sequence[NDArray[np.uint8]]) -> bytes:
    """Return pictures [h, w, 3] of one size as one PNG, with a gap between them."""
    gap = np.full((panels[0].shape[0], GAP_PX, 3), 255, dtype=np.uint8)
    parts: list[NDArray[Any]] = [part for panel in panels for part in (gap, panel)]
    return png(np.concatenate(parts[1:], axis=1))


def apart(picture: bytes, count: int = 2) -> list[NDArray[np.uint8]]:
    """Return the panels of a PNG from `beside`."""
    whole = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    width = (whole.shape[1] - (count - 1) * GAP_PX) // count
    return [whole[:, place * (width + GAP_PX) :][:, :width] for place in range(count)]
