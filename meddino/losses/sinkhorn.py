"""Sinkhorn-Knopp: teacher logits to assignments in which every prototype is used equally much over the whole batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meddino.core.precision import loss_dtype
from meddino.distributed.collectives import all_reduce_max, all_reduce_sum

# Elements handled at once: on a CPU what stays in its cache, on an accelerator what keeps it busy.
CHUNK_ELEMENTS = {"cpu": 2**18}
CHUNK_ELEMENTS_ACCELERATOR = 2**25


@dataclass(frozen=True)
class SinkhornTargets:
    """Assignments as a kernel between two scaling vectors: row_scale[n] * kernel[n, k] * column_scale[k].

    Two vectors instead of a second [n, K] tensor; `probabilities` multiplies out the rows that are asked for.

    Attributes:
        kernel: [n, K] exp(logits / temperature) with each row and each column brought to a maximum of 1; float32, or
            float64 where the logits are.
        row_scale: [n] of the same type.
        column_scale: [K] likewise.
    """

    kernel: Float[Tensor, "n prototypes"]
    row_scale: Float[Tensor, " n"]
    column_scale: Float[Tensor, " prototypes"]

    def __len__(self) -> int:
        return len(self.kernel)

    def probabilities(self, rows: slice | Int[Tensor, " m"] = slice(None)) -> Float[Tensor, "m prototypes"]:
        """Return the assignments of some rows; each sums to 1."""
        return (self.kernel[rows] * self.row_scale[rows, None]).mul_(self.column_scale)

    def at(self, index: Int[Tensor, " m"]) -> "SinkhornTargets":
        """Return the targets of some rows, copied."""
        return SinkhornTargets(self.kernel[index], self.row_scale[index], self.column_scale)

    def rows(self, start: int, stop: int) -> "SinkhornTargets":
        """Return the targets of a stretch of rows, as views."""
        return SinkhornTargets(self.kernel[start:stop], self.row_scale[start:stop], self.column_scale)


@torch.no_grad()
def sinkhorn_targets(
    logits: Float[Tensor, "n prototypes"], temperature: float, iterations: int = 3, overwrite: bool = False
) -> SinkhornTargets:
    """Balance teacher logits over the batches of all processes.

    Args:
        logits: Teacher logits of this process's rows; computed in float32, or in float64 where they are.
        temperature: Teacher temperature, > 0.
        iterations: Rounds of prototypes first, then rows; >= 1.
        overwrite: The logits' memory may become the kernel; saves one [n, K] tensor.

    Raises:
        ValueError: If there are no iterations or the temperature is not positive.

    Source: Cuturi 2013; Caron et al. 2020 (SwAV). Differences from DINOv3: the same numbers from two vectors, and
    nothing overflows or underflows. Q = exp(logits / temperature) may be multiplied by any factor a row and a
    column if the first row scaling takes the rows' factors back (the columns' cancel in the first round), so the
    maximum of every column and then of every row is subtracted. One global maximum, or none as upstream, leaves rows
    or columns of zeros or infinities once logits spread over more than 100 temperatures: NaN.
    """
    if iterations < 1 or temperature <= 0:
        raise ValueError(f"Sinkhorn needs iterations >= 1 and temperature > 0, not {iterations} and {temperature}")
    rows, prototypes = logits.shape
    # One message tells how many rows there are in all; each process may hold another number of them.
    total_rows = float(all_reduce_sum(torch.tensor(float(rows))))
    dtype = loss_dtype(logits)
    kernel = logits if overwrite and logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    column_max = logits.amax(0).to(dtype) if rows else logits.new_full((prototypes,), -torch.inf, dtype=dtype)
    column_max = all_reduce_max(column_max)
    row_scale = kernel.new_empty(rows)
    for part in row_chunks(rows, prototypes, logits.device):
        exponents = torch.sub(logits[part], column_max, out=kernel[part]) if rows else kernel[part]
        row_max = exponents.amax(1)
        exponents.sub_(row_max[:, None]).mul_(1 / temperature).exp_()
        row_scale[part] = (row_max / temperature).exp_()
    column_scale = kernel.new_empty(prototypes)
    for _ in range(iterations):
        column_sum = all_reduce_sum(torch.mv(kernel.t(), row_scale))
        column_scale = 1 / (prototypes * column_sum)
        row_scale = 1 / (total_rows * torch.mv(kernel, column_scale))
    return SinkhornTargets(kernel, row_scale * total_rows, column_scale)


def sinkhorn_knopp(
    logits: Float[Tensor, "n prototypes"], temperature: float, iterations: int = 3
) -> Float[Tensor, "n prototypes"]:
    """Return the balanced assignments themselves, each row summing to 1; see `sinkhorn_targets`."""
    return sinkhorn_targets(logits, temperature, iterations).probabilities()


def row_chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Yield stretches of rows so that [rows, columns] is handled a cache-sized piece at a time."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ACCELERATOR)
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
