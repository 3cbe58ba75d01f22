"""Cross-entropy against Sinkhorn assignments, straight from the bottleneck: never more than a chunk of logits at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from meddino.core.compilation import compilable
from meddino.core.device import at_least_float32, loss_dtype
from meddino.layers.linear import product
from meddino.losses.sinkhorn import SinkhornTargets, row_chunks

# Rows of one matrix product: fewer would read the prototypes' weight too often, more would hold more logits than needed.
PRODUCT_ROWS = {"cpu": 64}
PRODUCT_ROWS_ACCELERATOR = 1024
# Prototypes of one product that is added to a gradient: the product, and the copy of its transposed factor that oneDNN
# makes, stay this small, and in the cache.
PRODUCT_PROTOTYPES = {"cpu": 2048}
PRODUCT_PROTOTYPES_ACCELERATOR = 16384


def prototype_cross_entropy(
    bottleneck: Float[Tensor, "m dim"],
    prototypes: Float[Tensor, "k dim"],
    targets: SinkhornTargets,
    target_rows: Int[Tensor, "m r"],
    weights: Float[Tensor, "m r"],
    temperature: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, " m"]]:
    """Return the weighted sum of cross-entropies between the student's rows and teacher rows.

    sum over i, r of weights[i, r] * CE(target row target_rows[i, r], softmax(prototypes @ bottleneck[i] / temperature))

    Logits, softmax, assignments and their gradients exist for a few rows at a time. The backward pass computes the logits
    again: one product in four, where keeping them would hold [m, k] beside all of the backbone's activations.

    Args:
        bottleneck: The student head's output before its last layer.
        prototypes: Weight of its last layer.
        targets: The teacher's assignments.
        target_rows: Which teacher rows each student row is compared with.
        weights: Weight of each comparison.
        temperature: Student temperature, > 0.

    Returns:
        The sum, with gradients to bottleneck and prototypes, and each row's share of it, without a gradient.
    """
    total: Tensor
    by_row: Tensor
    total, by_row = _PrototypeCrossEntropy.apply(bottleneck, prototypes, targets, target_rows, weights, temperature)
    return total, by_row


@dataclass(frozen=True)
class _Comparison:
    targets: SinkhornTargets
    target_rows: Tensor
    weights: Tensor

    def losses(self, logits: Float[Tensor, "m k"], first_row: int, softmax: Float[Tensor, "m 2"]) -> Float[Tensor, " m"]:
        """Return each row's loss, and note for the gradient what its softmax needs: the row's maximum and its sum.

        The logits, already over the temperature, are used up.
        """
        losses = logits.new_empty(len(logits))
        for part, rows, assigned in self._assignments(logits, first_row):
            chunk, total_weight = logits[part], self.weights[rows].sum(1)
            losses[part], softmax[part, 0], softmax[part, 1] = _row_losses(chunk, assigned, total_weight)
        return losses

    def into_gradient(self, logits: Float[Tensor, "m k"], first_row: int, softmax: Float[Tensor, "m 2"]) -> None:
        """Turn logits, already over the temperature, into the gradient of `losses`, which noted `softmax`."""
        for part, rows, assigned in self._assignments(logits, first_row):
            largest, normaliser = softmax[part].unbind(1)
            scale = self.weights[rows].sum(1) / normaliser
            _into_row_gradients(logits[part], assigned, largest.contiguous(), scale)  # a view's offset would be compiled anew

    def _assignments(self, logits: Tensor, first_row: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield for a few rows at a time: where they lie in the logits, where in all rows, and the weighted assignments."""
        targets = self.targets
        for part in row_chunks(logits.shape[0], logits.shape[1], logits.device):
            rows = slice(first_row + part.start, first_row + part.stop)
            target_rows = self.target_rows[rows]
            scales = targets.row_scale[target_rows] * self.weights[rows]  # [m, r]
            kernels = [targets.kernel(column) for column in target_rows.unbind(1)]
            yield part, rows, _weighted_sum(kernels, scales, targets.column_scale)


@compilable
def _weighted_sum(kernels: list[Tensor], scales: Tensor, column_scale: Tensor) -> Tensor:
    """Return the assignments of some rows, weighted, in the memory of the first kernel."""
    assigned = kernels[0].mul_(scales[:, :1])
    for other in range(1, len(kernels)):
        assigned.addcmul_(kernels[other], scales[:, other, None])
    return assigned.mul_(column_scale)


@compilable
def _row_losses(logits: Tensor, assigned: Tensor, total_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, largest logits and normalisers of some rows; the logits are used up."""
    # Less the row's maximum, in the assignment's product too: large logits would cost digits in both terms.
    largest = logits.amax(1)
    logits.sub_(largest[:, None])
    agreement = torch.linalg.vecdot(assigned, logits)
    normaliser = logits.exp_().sum(1)
    return total_weight * normaliser.log() - agreement, largest, normaliser


@compilable
def _into_row_gradients(logits: Tensor, assigned: Tensor, largest: Tensor, scale: Tensor) -> None:
    logits.sub_(largest[:, None]).exp_().mul_(scale[:, None]).sub_(assigned)


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        bottleneck: Tensor,
        prototypes: Tensor,
        targets: SinkhornTargets,
        target_rows: Tensor,
        weights: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        device = bottleneck.device.type
        # The products' data type is asked for; all else is at least float32, which autocast would not leave alone.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else bottleneck.dtype
        comparison = _Comparison(targets, target_rows, weights)
        by_row = bottleneck.new_empty(len(bottleneck), dtype=targets.dtype)
        softmax = by_row.new_empty(len(by_row), 2)
        with torch.autocast(device, enabled=False):
            for rows, logits, _ in _logits(bottleneck, prototypes, temperature, dtype):
                by_row[rows] = comparison.losses(logits, rows.start, softmax[rows])
                del logits  # before the next ones are made
        ctx.save_for_backward(bottleneck, prototypes, softmax)
        ctx.comparison, ctx.temperature, ctx.dtype = comparison, temperature, dtype
        ctx.mark_non_differentiable(by_row)
        return by_row.sum(), by_row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Whoever goes backward inside an autocast block has it on here too.
        with torch.autocast(grads[0].device.type, enabled=False):
            return _PrototypeCrossEntropy._gradients(ctx, *grads)

    @staticmethod
    def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bottleneck, prototypes, softmax = ctx.saved_tensors
        given: _Comparison = ctx.comparison
        comparison = _Comparison(given.targets, given.target_rows, given.weights * grads[0])
        ctx.comparison = None  # the graph may outlive this call, and the kernel is large
        wants_bottleneck, wants_prototypes = ctx.needs_input_grad[:2]
        grad_bottleneck = torch.empty_like(bottleneck) if wants_bottleneck else None
        grad_prototypes: Tensor | None = None
        columns = prototypes.to(ctx.dtype).t()
        for rows, logits, features in _logits(bottleneck, prototypes, ctx.temperature, ctx.dtype):
            comparison.into_gradient(logits, rows.start, softmax[rows])
            gradient = logits.to(ctx.dtype)
            if grad_bottleneck is not None:
                grad_bottleneck[rows] = product(gradient, columns)
            if wants_prototypes:
                grad_prototypes = _add_product(grad_prototypes, gradient, features)
            del logits, gradient  # before the next ones are made
        if grad_bottleneck is not None:
            grad_bottleneck.div_(ctx.temperature)
        if wants_prototypes and grad_prototypes is None:
            grad_prototypes = torch.zeros_like(prototypes)
        return grad_bottleneck, grad_prototypes, None, None, None, None


def _logits(
    bottleneck: Tensor, prototypes: Tensor, temperature: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield stretches of rows with their logits over the temperature (float32 at least) and the features they came from."""
    weight = prototypes.to(dtype)
    step = PRODUCT_ROWS.get(bottleneck.device.type, PRODUCT_ROWS_ACCELERATOR)
    for start in range(0, len(bottleneck), step):
        rows = slice(start, min(start + step, len(bottleneck)))
        features = (bottleneck[rows] / temperature).to(dtype)
        yield rows, at_least_float32(product(features, weight)), features


def _add_product(total: Tensor | None, gradient: Tensor, features: Tensor) -> Tensor:
    """Return total + gradient^T features, in float32 at least; the first product starts the total."""
    first = total is None
    if total is None:
        dtype = loss_dtype(features)
        total = features.new_empty(gradient.shape[1], features.shape[1], dtype=dtype)
    step = PRODUCT_PROTOTYPES.get(total.device.type, PRODUCT_PROTOTYPES_ACCELERATOR)
    for start in range(0, len(total), step):
        part = slice(start, start + step)
        found = product(gradient[:, part].t(), features.t())
        if first:
            total[part] = found
        else:
            total[part].add_(found)
    return total
