"""nnU-Net-like augmentation of crops, from MONAI's transforms; a pure function of its seed."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from meddino_evaluation.data.labels import IGNORED


@lru_cache(maxsize=1)
def _transforms() -> Any:
    # MONAI takes seconds to import: only where somebody augments.
    from monai import transforms as mt

    both, image = ["image", "label"], ["image"]
    return mt.Compose(
        [
            mt.RandAffined(
                both, prob=0.3, rotate_range=np.pi, scale_range=(-0.3, 0.4), mode=("bilinear", "nearest"), padding_mode="zeros"
            ),
            mt.RandFlipd(both, prob=0.5, spatial_axis=0),
            mt.RandFlipd(both, prob=0.5, spatial_axis=1),
            mt.RandGaussianNoised(image, prob=0.1, std=0.03),
            mt.RandGaussianSmoothd(image, prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0)),
            mt.RandScaleIntensityd(image, factors=(-0.25, 0.25), prob=0.15),
            mt.RandSimulateLowResolutiond(image, prob=0.25, zoom_range=(0.5, 1.0), upsample_mode="bilinear"),
            mt.RandAdjustContrastd(image, prob=0.15, gamma=(0.7, 1.5)),
        ]
    )


def augment(
    intensities: Float[Tensor, "channels rows cols"], labels: NDArray[np.int32], window: tuple[float, float], seed: int
) -> tuple[Float[Tensor, "channels rows cols"], NDArray[np.int32]]:
    """Augment one crop.

    Args:
        intensities: Not yet normalised.
        labels: Label values; what turns in from outside is `IGNORED`.
        window: The intensities between which the model looks; noise and contrast are relative to it.
        seed: Of all draws.

    Source: nnU-Net's 2D training, with MONAI's transforms and their order. Differences: no elastic deformation (nnU-Net has
    none since v2 either), intensity changes after clipping to the model's window.
    """
    low, high = window
    unit = (intensities.clamp(low, high) - low) / (high - low)
    pipeline = _transforms().set_random_state(seed=seed % 2**32)
    # Labels are moved up by one so that the zeros that turn in mean "ignored"; air turns in as 0 of the unit window.
    moved = torch.from_numpy(labels.astype(np.float32) - IGNORED)[None]
    done = pipeline({"image": unit, "label": moved})
    found = np.rint(done["label"][0].numpy()).astype(np.int32) + IGNORED
    return torch.as_tensor(done["image"]).as_subclass(Tensor).clamp(0, 1) * (high - low) + low, found
