"""Sinkhorn-Knopp: teacher logits to assignments in which every prototype is used equally much over the whole batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from meddino.core.compilation import compilable
from meddino.core.device import at_least_float32, loss_dtype
from meddino.distributed.collectives import all_reduce_max, all_reduce_sum
from meddino.layers.linear import product

# Elements handled at once: on a CPU what stays in its cache, on an accelerator what keeps it busy.
CHUNK_ELEMENTS = {"cpu": 2**18}
CHUNK_ELEMENTS_ACCELERATOR = 2**25
# A kernel of all rows up to this size is kept; a larger one is computed again, chunk by chunk, in each pass. On a CPU
# memory is cheap and products are not.
KEPT_BYTES = {"cpu": 2**34}
KEPT_BYTES_ACCELERATOR = 3 * 2**30


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's logits, computed for the rows that are asked for: bottleneck and prototypes take a hundredth of them.

    Attributes:
        bottleneck: The head's output before its last layer; or the logits themselves where there are no prototypes.
        prototypes: Weight of the head's last layer.
        dtype: Of the product, as autocast would choose it; None for the bottleneck's own.
    """

    bottleneck: Float[Tensor, "n dim"]
    prototypes: Float[Tensor, "k dim"] | None = None
    dtype: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.bottleneck)

    @property
    def count(self) -> int:
        """Number of prototypes."""
        return self.bottleneck.shape[1] if self.prototypes is None else len(self.prototypes)

    def rows(self, rows: slice | Int[Tensor, " m"] = slice(None)) -> Float[Tensor, "m k"]:
        """Return the logits of some rows, in float32 at least, in memory of their own."""
        features = self.bottleneck[rows]
        if self.prototypes is None:
            return features.to(loss_dtype(features), copy=True)
        dtype = self.dtype or features.dtype
        return at_least_float32(product(features.to(dtype), self.prototypes.to(dtype)))


@dataclass(frozen=True)
class SinkhornTargets:
    """Assignments as a kernel between two scaling vectors: row_scale[n] * kernel[n, k] * column_scale[k].

    The kernel is exp(logits / temperature) with each row and each column brought to a maximum of 1. `probabilities`
    multiplies out the rows that are asked for.

    Attributes:
        logits: What the kernel is computed from where it is not kept.
        kept: [n, K] the kernel, where it is small; float32, or float64 where the logits are.
        column_max: [K] subtracted from the logits, then
        row_max: [n] what was each row's maximum.
        temperature: Divides them.
        row_scale: [n].
        column_scale: [K].
    """

    logits: TeacherLogits
    kept: Float[Tensor, "n prototypes"] | None
    column_max: Float[Tensor, " prototypes"]
    row_max: Float[Tensor, " n"]
    temperature: float
    row_scale: Float[Tensor, " n"]
    column_scale: Float[Tensor, " prototypes"]

    def __len__(self) -> int:
        return len(self.row_scale)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the assignments."""
        return self.row_scale.dtype

    def kernel(self, rows: slice | Int[Tensor, " m"]) -> Float[Tensor, "m prototypes"]:
        """Return the kernel of some rows: a view of what is kept if a slice is asked for, else in memory of its own."""
        if self.kept is not None:
            return self.kept[rows]
        return _kernel(self.logits.rows(rows), self.column_max, self.row_max[rows], self.temperature)

    def probabilities(self, rows: slice | Int[Tensor, " m"] = slice(None)) -> Float[Tensor, "m prototypes"]:
        """Return the assignments of some rows; each sums to 1."""
        return (self.kernel(rows) * self.row_scale[rows, None]).mul_(self.column_scale)

    def rows(self, start: int, stop: int) -> "SinkhornTargets":
        """Return the targets of a stretch of rows, as views."""
        part = slice(start, stop)
        logits = TeacherLogits(self.logits.bottleneck[part], self.logits.prototypes, self.logits.dtype)
        kept = None if self.kept is None else self.kept[part]
        scales = (self.row_scale[part], self.column_scale)
        return SinkhornTargets(logits, kept, self.column_max, self.row_max[part], self.temperature, *scales)


@torch.no_grad()
def sinkhorn_targets(
    logits: TeacherLogits, temperature: float, iterations: int = 3, *, give_up_kernel: bool = False
) -> SinkhornTargets:
    """Balance teacher logits over the batches of all processes.

        Q = exp(logits / temperature).T; Q = Q / Q.sum()        # [K, n]
        for _ in range(iterations):
            for k in range(K): Q[k] = Q[k] / Q[k].sum() / K     # every prototype is used equally much
            for i in range(n): Q[:, i] = Q[:, i] / Q[:, i].sum() / n
        return (Q * n).T

    Args:
        logits: Of this process's rows; computed in float32, or in float64 where they are. Beyond `KEPT_BYTES` never more
            than a chunk of them exists: five passes compute them again (measured in operations: two in a hundred of a step).
        temperature: Teacher temperature, > 0.
        iterations: Rounds of prototypes first, then rows; >= 1.
        give_up_kernel: Where memory is short: whoever asks for rows of the targets computes them again.

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
    with torch.autocast(logits.bottleneck.device.type, enabled=False):  # on accelerators it takes products of vectors to bf16
        return _balanced(logits, temperature, iterations, give_up_kernel)


def _balanced(logits: TeacherLogits, temperature: float, iterations: int, give_up_kernel: bool) -> SinkhornTargets:
    rows, prototypes, device = len(logits), logits.count, logits.bottleneck.device
    dtype = loss_dtype(logits.bottleneck)
    keeps = rows * prototypes * dtype.itemsize <= KEPT_BYTES.get(device.type, KEPT_BYTES_ACCELERATOR)
    kept = logits.rows() if keeps else None
    stretches = [slice(0, rows)] if keeps else list(row_chunks(rows, prototypes, device))
    column_max = torch.full((prototypes,), -torch.inf, dtype=dtype, device=device)
    for part in stretches if rows else ():
        column_max = torch.maximum(column_max, (logits.rows(part) if kept is None else kept).amax(0))
    column_max = all_reduce_max(column_max)
    row_max = torch.empty(rows, dtype=dtype, device=device)
    row_scale, column_sum = torch.empty_like(row_max), torch.zeros_like(column_max)
    for part in row_chunks(rows, prototypes, device):
        kernel, row_max[part] = _first_kernel(logits.rows(part) if kept is None else kept[part], column_max, temperature)
        row_scale[part] = (row_max[part] / temperature).exp_()
        if kept is None:
            column_sum += torch.mv(kernel.t(), row_scale[part])
    if kept is not None:
        column_sum = torch.mv(kept.t(), row_scale)
    targets = SinkhornTargets(logits, kept, column_max, row_max, temperature, row_scale, column_max)
    column_scale = column_max
    # Each process may hold another number of rows: they are summed along with the first sums, not by a message of their own.
    sums = all_reduce_sum(functional.pad(column_sum, (0, 1), value=float(rows)))
    column_sum, total_rows = sums[:-1], sums[-1]
    for round_number in range(iterations):
        column_scale = 1 / (prototypes * (all_reduce_sum(column_sum) if round_number else column_sum))
        column_sum = torch.zeros_like(column_max)
        for part in stretches:
            # A row's new scale and its share of the next round's sums, in one pass.
            kernel = targets.kernel(part)
            row_scale[part] = 1 / (total_rows * torch.mv(kernel, column_scale))
            if round_number < iterations - 1:
                column_sum += torch.mv(kernel.t(), row_scale[part])
    held = None if give_up_kernel else kept
    return SinkhornTargets(logits, held, column_max, row_max, temperature, row_scale * total_rows, column_scale)


@compilable
def _kernel(logits: Tensor, column_max: Tensor, row_max: Tensor, temperature: float) -> Tensor:
    """Return the kernel of some rows in the memory of their logits."""
    return _into_kernel(logits.sub_(column_max), row_max, temperature)


@compilable
def _first_kernel(logits: Tensor, column_max: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the kernel of some rows in the memory of their logits, and each row's maximum, which is looked for here."""
    exponents = logits.sub_(column_max)
    row_max = exponents.amax(1)
    return _into_kernel(exponents, row_max, temperature), row_max


def _into_kernel(exponents: Tensor, row_max: Tensor, temperature: float) -> Tensor:
    """Return exp((exponents - row_max) / temperature) in the exponents' memory."""
    return exponents.sub_(row_max[:, None]).mul_(1 / temperature).exp_()


def row_chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Yield stretches of rows so that [rows, columns] is handled a cache-sized piece at a time."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ACCELERATOR)
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
