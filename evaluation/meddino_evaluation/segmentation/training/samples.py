"""Which crops training sees: drawn by (seed, step), labels oversampled, and for a frozen encoder each crop encoded once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meddino.core.errors import ConfigError
from meddino.core.seeds import derive_seed, numpy_rng
from meddino_evaluation.data.labels import IGNORED
from meddino_evaluation.data.prepare import PreparedCase
from meddino_evaluation.segmentation.config import LabelsConfig, TrainingConfig
from meddino_evaluation.segmentation.inference.sliding_window import pad_amounts, window_starts
from meddino_evaluation.segmentation.training.augmentation import augment


@dataclass(frozen=True)
class SliceRef:
    """A labelled slice: number of its case and of the slice in it."""

    case: int
    z: int


@dataclass(frozen=True)
class Crop:
    """A square of a padded slice; `y` and `x` are its corner."""

    case: int
    z: int
    y: int
    x: int


@dataclass(frozen=True)
class CropBatch:
    """What one step trains on.

    Attributes:
        intensities: [B, C, crop, crop], not yet normalised.
        labels: [B, crop, crop] label values, `IGNORED` where not counted.
        crops: Where each was cut.
    """

    intensities: Float[Tensor, "batch channels rows cols"]
    labels: NDArray[np.int32]
    crops: tuple[Crop, ...]


def choose_slices(cases: Sequence[PreparedCase], config: LabelsConfig, seed: int) -> list[SliceRef]:
    """Choose the slices whose labels training may see.

    Args:
        cases: Training cases.
        config: How many and how.
        seed: Draws them; nested, so fewer slices are the first of more.

    Raises:
        ConfigError: More are asked for than there are.
    """
    everything = [SliceRef(number, z) for number, case in enumerate(cases) for z in range(case.num_slices)]
    if config.train_slices is None:
        return everything
    if config.train_slices > len(everything):
        raise ConfigError(f"labels.train_slices is {config.train_slices}, but the training cases have {len(everything)} slices")
    order = numpy_rng(seed, "slices").permutation(len(everything))
    shuffled = [everything[index] for index in order]
    if config.slice_choice == "random":
        return shuffled[: config.train_slices]
    return _balanced(shuffled, cases, config.train_slices)


def _balanced(shuffled: list[SliceRef], cases: Sequence[PreparedCase], count: int) -> list[SliceRef]:
    present = {ref: cases[ref.case].present[ref.z] for ref in shuffled}
    seen = dict.fromkeys(sorted({value for values in present.values() for value in values}), 0)
    chosen: list[SliceRef] = []
    left = list(shuffled)
    while len(chosen) < count:
        # The label seen least so far is next; a slice that holds it and the most other rare ones is taken.
        rare = min((value for value in seen if any(value in present[ref] for ref in left)), key=lambda v: seen[v], default=None)
        candidates = [ref for ref in left if rare in present[ref]] if rare is not None else left
        best = max(candidates, key=lambda ref: sum(1.0 / (1 + seen[value]) for value in present[ref]))
        for value in present[best]:
            seen[value] += 1
        chosen.append(best)
        left.remove(best)
    return chosen


class CropSampler:
    """Draws batches of crops as a pure function of (seed, step).

    Args:
        cases: Training cases, prepared.
        slices: Slices that may be used.
        config: Batch size, crop side, oversampling.
        neighbours: Neighbouring slices on either side.
        window: Intensities between which the model looks; the lower end stands outside a slice.
        seed: Of the run.

    Source: nnU-Net's oversampling: the last share of a batch is cut about a pixel of a label drawn evenly among those in
    the chosen slice. Difference: slices that hold a label are drawn directly, instead of a case and then a slice.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        slices: Sequence[SliceRef],
        config: TrainingConfig,
        neighbours: int,
        window: tuple[float, float],
        seed: int,
    ) -> None:
        self.cases, self.slices, self.config = cases, list(slices), config
        self.neighbours, self.window, self.seed = neighbours, window, seed
        self.with_label = [ref for ref in self.slices if cases[ref.case].present[ref.z]]
        self.values = sorted({value for ref in self.with_label for value in cases[ref.case].present[ref.z]})
        self.by_value = {
            value: [ref for ref in self.with_label if value in cases[ref.case].present[ref.z]] for value in self.values
        }
        if not self.with_label:
            raise ConfigError(
                f"none of the {len(self.slices)} training slices holds a label; give more (labels.train_slices) or other cases"
            )

    def batch(self, step: int) -> CropBatch:
        """Return the batch of a step."""
        size = self.config.batch_size
        forced = round(size * self.config.foreground_oversampling)
        crops, images, labels = [], [], []
        for place in range(size):
            rng = numpy_rng(self.seed, "crop", step, place)
            crop = self._draw(rng, place >= size - forced)
            image, label = self.cut(crop)
            if self.config.augmentation == "nnunet":
                image, label = augment(image, label, self.window, derive_seed(self.seed, "augment", step, place))
            crops.append(crop)
            images.append(image)
            labels.append(label)
        return CropBatch(torch.stack(images), np.stack(labels), tuple(crops))

    def cut(self, crop: Crop) -> tuple[Tensor, NDArray[np.int32]]:
        """Return a crop's intensities [C, crop, crop] and label values [crop, crop]."""
        case, side = self.cases[crop.case], self.config.crop_px
        rows, cols = case.plane
        (top, bottom), (left, right) = pad_amounts(rows, side), pad_amounts(cols, side)
        image = F.pad(case.image(crop.z, self.neighbours), (left, right, top, bottom), value=self.window[0])
        label = np.pad(case.label(crop.z), ((top, bottom), (left, right)), constant_values=IGNORED)
        place = (slice(crop.y, crop.y + side), slice(crop.x, crop.x + side))
        return image[(..., *place)], label[place]

    def _draw(self, rng: np.random.Generator, with_label: bool) -> Crop:
        value: int | None = None
        if with_label and self.config.sampling == "balanced":
            value = self.values[int(rng.integers(len(self.values)))]
            refs = self.by_value[value]
        else:
            refs = self.with_label if with_label else self.slices
        ref = refs[int(rng.integers(len(refs)))]
        case, side = self.cases[ref.case], self.config.crop_px
        target = self._label_pixel(case, ref.z, value, rng) if with_label else None
        corner = []
        for axis, size in enumerate(case.plane):
            padded = max(size, side)
            offset = pad_amounts(size, side)[0]
            if self.config.crops == "grid":
                starts = np.array(window_starts(padded, side, 0.5))
                if target is not None:
                    starts = starts[(starts <= target[axis] + offset) & (target[axis] + offset < starts + side)]
                corner.append(int(starts[int(rng.integers(len(starts)))]))
            elif target is not None:
                corner.append(int(np.clip(target[axis] + offset - side // 2, 0, padded - side)))
            else:
                corner.append(int(rng.integers(padded - side + 1)))
        return Crop(ref.case, ref.z, corner[0], corner[1])

    def _label_pixel(self, case: PreparedCase, z: int, value: int | None, rng: np.random.Generator) -> tuple[int, int]:
        if value is None:
            values = sorted(case.present[z])
            value = values[int(rng.integers(len(values)))]
        rows, cols = np.nonzero(case.label(z) == value)
        pick = int(rng.integers(len(rows)))
        return int(rows[pick]), int(cols[pick])
