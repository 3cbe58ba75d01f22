"""Which patches the student does not see: blocks, completed at random to an exact count."""

import math

import numpy as np
from numpy.typing import NDArray

from meddino.core.seeds import numpy_rng
from meddino_pretrain.methods.dinov3.config import MaskingConfig

_TRIES = 10


def masked_counts(config: MaskingConfig, seed: int, step: int, crops: int, patches: int) -> NDArray[np.int64]:
    """Decide how many patches of each global crop of a step are masked.

    A share `probability` of the crops is masked; the nth of them takes the upper end of the nth of equal parts of
    `ratio`; which crop is the nth is drawn. All ranks decide over the whole step, so nothing depends on their number,
    and the number of masked patches of a step is the same in every step.

    Args:
        config: Share and ratios.
        seed: The stage's seed.
        step: Optimizer step.
        crops: Global crops in the step: 2 x global batch.
        patches: Patches in a crop.

    Returns:
        [crops] in crop-major order of the whole step (crop * global_batch + sample); 0 where a crop is not masked.

    Source: DINOv3's collate function, which spreads the ratios over one process's batch.
    """
    masked = int(crops * config.probability)
    ends = np.linspace(*config.ratio, masked + 1)[1:]
    counts = np.zeros(crops, dtype=np.int64)
    counts[:masked] = np.maximum(1, (patches * ends).astype(np.int64))
    return numpy_rng(seed, "masked-crops", step).permutation(counts)


def block_mask(config: MaskingConfig, rng: np.random.Generator, grid: tuple[int, int], count: int) -> NDArray[np.bool_]:
    """Draw a mask of blocks with an exact number of masked patches.

    Blocks of random size and shape are laid down while they fit into what is left; when none fits any more, single
    patches drawn at random complete the count.

    Args:
        config: Smallest block and its shapes.
        rng: The image's own generator.
        grid: Patches along (y, x).
        count: Patches to mask, 0 to all.

    Returns:
        bool [grid y, grid x] with exactly `count` True.

    Source: Bao et al. 2022 (BEiT), algorithm 1; the random completion is DINOv3's.
    """
    rows, cols = grid
    mask = np.zeros(grid, dtype=bool)
    left = count
    log_aspect = math.log(config.block_aspect)
    while left >= config.min_block:
        placed = 0
        for area_draw, aspect_draw, y_draw, x_draw in rng.random((_TRIES, 4)):
            area = config.min_block + area_draw * (left - config.min_block)
            aspect = math.exp(log_aspect * (1 - 2 * aspect_draw))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height <= rows and 0 < width <= cols):
                continue
            top, start = int(y_draw * (rows - height + 1)), int(x_draw * (cols - width + 1))
            block = mask[top : top + height, start : start + width]
            placed = block.size - int(block.sum())
            if 0 < placed <= left:
                block[:] = True
                break
            placed = 0
        if not placed:
            break
        left -= placed
    if left:
        free = np.flatnonzero(~mask)
        mask.reshape(-1)[rng.permutation(free)[:left]] = True
    return mask


def masks_for_crops(
    config: MaskingConfig, seed: int, step: int, global_batch: int, samples: range, grid: tuple[int, int], global_crops: int
) -> NDArray[np.bool_]:
    """Draw the masks of some samples of a step.

    Args:
        config: How to mask.
        seed: The stage's seed.
        step: Optimizer step.
        global_batch: Slices in the step.
        samples: Numbers within the step of the samples that this process computes.
        grid: Patches along (y, x) of a global crop.
        global_crops: Global crops of each slice.

    Returns:
        bool [global_crops * len(samples), patches]: row `crop * len(samples) + i` is the crop of sample `samples[i]`.
    """
    counts = masked_counts(config, seed, step, global_crops * global_batch, grid[0] * grid[1])
    rows = []
    for crop in range(global_crops):
        for sample in samples:
            image = crop * global_batch + sample
            count = int(counts[image])
            rng = numpy_rng(seed, "mask", step, image) if count else np.random.default_rng(0)
            rows.append(block_mask(config, rng, grid, count).reshape(-1))
    return np.stack(rows)
