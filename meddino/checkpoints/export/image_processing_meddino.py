"""Hounsfield units to model input, for transformers. A copy of this file travels in exported folders."""

from typing import Any

import numpy as np
from transformers import BaseImageProcessor, BatchFeature


class MedDINOImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Clips Hounsfield units to a window, normalises them and repeats them to channels; sizes stay as they are."""

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        hu_min: float = -1000.0,
        hu_max: float = 1000.0,
        image_mean: Any = (65.108,),
        image_std: Any = (178.017,),
        channels: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hu_min, self.hu_max, self.channels = hu_min, hu_max, channels
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = None, **_kwargs: Any) -> BatchFeature:
        """Return {"pixel_values": [batch, channels, rows, columns]}.

        Args:
            images: One slice [rows, columns] in Hounsfield units, or a list of slices of one size.
            return_tensors: "pt" or "np".
        """
        slices = images if isinstance(images, list | tuple) else [images]
        hu = np.stack([np.asarray(one, dtype=np.float32) for one in slices])
        if hu.ndim != 3:
            raise ValueError(f"expected slices [rows, columns] in Hounsfield units, found shape {list(hu.shape[1:])}")
        grey = (hu.clip(self.hu_min, self.hu_max) - np.float32(self.image_mean[0])) / np.float32(self.image_std[0])
        pixels = np.repeat(grey[:, None], self.channels, axis=1)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
