"""What a slice or picture looks like, in 255 bytes that survive resampling, padding, windowing, noise and another kernel."""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

LOW_HU, HIGH_HU = -130.0, 200.0  # inside every window that shows soft tissue, so a windowed copy looks the same
GRID_PX = 32
FREQUENCIES = 16
EXTENT = 1.8  # half side of the looked-at square over the body's radius of gyration: just around the body
MAX_SLICES = 48
_MIN_MASS = 0.004  # of the slice's pixels, as soft tissue: less has no shape worth comparing
_WORK_PX = 256
_PICTURE_PX = 64
_PICTURE_BLUR_PX = 3.0
_PICTURE_FLAT = 0.02  # of the range: contrast below is noise
_PICTURE_LOWEST = 8

Bytes = NDArray[np.int8]


@dataclass(frozen=True)
class Fingerprint:
    """What a volume looks like.

    Attributes:
        places_mm: [n] position of the slices, rising.
        vectors: int8 [n, 255], each of length about 127 * sqrt(255) / 4.
    """

    places_mm: NDArray[np.float64]
    vectors: Bytes

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a record."""
        return {
            "places_mm": [round(float(place), 3) for place in self.places_mm],
            "vectors": base64.b85encode(self.vectors.tobytes()).decode(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Fingerprint":
        """Read what `to_json` wrote."""
        places = np.asarray(values["places_mm"], dtype=np.float64)
        vectors = np.frombuffer(base64.b85decode(values["vectors"]), dtype=np.int8)
        return cls(places, vectors.reshape(len(places), -1))


def chosen_slices(count: int) -> NDArray[np.intp]:
    """Return which slices of a volume are looked at: all, or `MAX_SLICES` spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_SLICES)).round().astype(np.intp))


def slice_vector(hu: NDArray[np.int16], spacing_mm: tuple[float, float]) -> Bytes | None:
    """Describe one slice, or None where it shows too little.

    The soft tissue's centre and radius of gyration fix a square; what lies in it is averaged onto a 32 x 32 grid, and the
    lower quarter of its cosine transform is kept, each coefficient weighted with its frequency: natural pictures fall off
    with 1/f, so that afterwards all coefficients say about as much and different patients have little in common.

    Args:
        hu: int16 [rows, cols].
        spacing_mm: Between rows, between columns.
    """
    step = max(1, max(hu.shape) // _WORK_PX)
    clipped = _averaged(np.clip(hu, np.int16(LOW_HU), np.int16(HIGH_HU)) - np.int16(LOW_HU), step)
    total = float(clipped.sum())
    if total < _MIN_MASS * clipped.size * (HIGH_HU - LOW_HU):
        return None
    by_row, by_col = clipped.sum(axis=1) / total, clipped.sum(axis=0) / total
    y_mm, x_mm = (np.arange(size) * gap for size, gap in zip(clipped.shape, spacing_mm, strict=True))
    centre_y, centre_x = float(by_row @ y_mm), float(by_col @ x_mm)
    radius = float(np.sqrt(by_row @ (y_mm - centre_y) ** 2 + by_col @ (x_mm - centre_x) ** 2))
    half = EXTENT * max(radius, 4 * max(spacing_mm))
    grid = _cut(clipped, (centre_y / spacing_mm[0], centre_x / spacing_mm[1]), (half / spacing_mm[0], half / spacing_mm[1]))
    return _as_bytes(dctn(grid, norm="ortho")[:FREQUENCIES, :FREQUENCIES] * _WEIGHTS)


def picture_vector(grey: NDArray[Any]) -> Bytes | None:
    """Describe a whole picture, or None where it shows nothing: a perceptual hash of 255 numbers instead of 64 bits.

    Contrast is made even over the picture, and of its cosine transform the waves of 8 to 23 halves a side are kept: what all
    pictures of a kind share, as the bright disc of a fundus, lies below. It survives another size, JPEG, noise and a change
    of brightness and contrast, but not another crop.

    Args:
        grey: [rows, cols], any real type.

    Source: pHash (Zauner 2010) takes the lowest waves of the picture itself, by which two eyes are one.
    """
    small = Image.fromarray(grey.astype(np.float32)).resize((_PICTURE_PX, _PICTURE_PX), Image.Resampling.BILINEAR)
    values = np.asarray(small)
    span = float(np.ptp(values))
    if span < 1e-3:
        return None
    detail = values / span
    detail = detail - gaussian_filter(detail, _PICTURE_BLUR_PX)
    even = detail / (np.sqrt(gaussian_filter(detail * detail, _PICTURE_BLUR_PX)) + _PICTURE_FLAT)
    # From an even wave on, so that turning a picture over changes the same signs as of a slice.
    waves = slice(_PICTURE_LOWEST, _PICTURE_LOWEST + FREQUENCIES)
    return _as_bytes(dctn(even, norm="ortho")[waves, waves])


def _as_bytes(coefficients: NDArray[np.floating]) -> Bytes | None:
    flat = coefficients.reshape(-1)[1:]
    length = float(np.linalg.norm(flat))
    if length < 1e-3:
        return None
    return np.asarray(np.clip(np.rint(flat * (_SCALE / length)), -127, 127), dtype=np.int8)


def _averaged(values: NDArray[np.int16], step: int) -> NDArray[np.float32]:
    """Return the means of squares of `step` pixels; the sums are whole numbers, so that their order changes nothing."""
    rows, cols = values.shape[0] // step * step, values.shape[1] // step * step
    fits = step * step * int(HIGH_HU - LOW_HU) <= np.iinfo(np.int16).max
    whole = values[:rows, :cols] if fits else values[:rows, :cols].astype(np.int32)
    # Rows first: what lies side by side in memory is added in one go.
    by_row = sum((whole[row::step] for row in range(1, step)), whole[::step])
    sums = sum((by_row[:, col::step] for col in range(1, step)), by_row[:, ::step])
    return sums.astype(np.float32) / np.float32(step * step)


_SCALE = 500.0
_FREQUENCY = np.hypot(*np.meshgrid(np.arange(FREQUENCIES), np.arange(FREQUENCIES), indexing="ij"))
_WEIGHTS = (_FREQUENCY * np.exp(-((_FREQUENCY / FREQUENCIES) ** 4))).astype(np.float32)


def _cut(picture: NDArray[np.float32], centre: tuple[float, float], half: tuple[float, float]) -> NDArray[np.float32]:
    """Average a square around a centre onto the grid; outside the picture there is air."""
    bounds = [(middle - reach, middle + reach + 1) for middle, reach in zip(centre, half, strict=True)]
    margin = [
        max(0, int(np.ceil(-low)) + 1, int(np.ceil(high - size)) + 1)
        for (low, high), size in zip(bounds, picture.shape, strict=True)
    ]
    padded = np.pad(picture, [(margin[0], margin[0]), (margin[1], margin[1])])
    (top, bottom), (left, right) = ((low + pad, high + pad) for (low, high), pad in zip(bounds, margin, strict=True))
    resized = Image.fromarray(padded).resize((GRID_PX, GRID_PX), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return np.asarray(resized)


def flipped(vectors: Bytes, rows: bool, cols: bool) -> Bytes:
    """Return the vectors of the slices turned over."""
    return vectors * flip_signs(rows, cols)


def flip_signs(rows: bool, cols: bool) -> Bytes:
    """Return what turning a slice over multiplies its vector with, [255]: odd cosines change sign."""
    sign = np.ones((FREQUENCIES, FREQUENCIES), dtype=np.int8)
    if rows:
        sign[1::2, :] *= -1
    if cols:
        sign[:, 1::2] *= -1
    return sign.reshape(-1)[1:]
