"""Stored values to model input, for transformers. A copy of this file travels in exported folders."""

from typing import Any

import numpy as np
from transformers import BaseImageProcessor, BatchFeature


class MedDINOImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Clips values to what the model tells apart, normalises them and repeats grey to channels; sizes stay as they are."""

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        modality: str = "ct",
        shown_range: Any = (-1000.0, 1000.0),
        image_mean: Any = (65.108,),
        image_std: Any = (178.017,),
        channels: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.modality, self.shown_range, self.channels = modality, list(shown_range), channels
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(
        self, images: Any, return_tensors: str | None = None, value_range: Any = None, **_kwargs: Any
    ) -> BatchFeature:
        """Return {"pixel_values": [batch, channels, rows, columns]}.

        Args:
            images: One slice [rows, columns], or a list of slices of one size; of a model of CT in Hounsfield units.
            return_tensors: "pt" or "np".
            value_range: Of another modality: the values that become 0 and 1 (of MR the volume's 0.5 and 99.5 percentiles, of
                an 8-bit picture 0 and 255). None: they are in [0, 1] already.
        """
        slices = images if isinstance(images, list | tuple) else [images]
        values = np.stack([np.asarray(one, dtype=np.float32) for one in slices])
        if values.ndim != 3:
            raise ValueError(f"expected slices [rows, columns] of {self.modality}, found shape {list(values.shape[1:])}")
        if value_range is not None and self.modality != "ct":
            low, high = (np.float32(end) for end in value_range)
            values = (values - low) / (high - low)
        grey = values.clip(*self.shown_range)[:, None]
        mean, std = (np.asarray(numbers, dtype=np.float32).reshape(-1, 1, 1) for numbers in (self.image_mean, self.image_std))
        pixels = (np.repeat(grey, self.channels, axis=1) - mean) / std
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
