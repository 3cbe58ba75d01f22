"""Cross-entropy against Sinkhorn assignments, straight from the bottleneck: never more than a chunk of logits at once."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from meddino.layers.linear import product
from meddino.losses.sinkhorn import SinkhornTargets, row_chunks

# Rows of one matrix product: fewer would read the prototypes' weight too often, more would hold more logits than needed.
PRODUCT_ROWS = {"cpu": 128}
PRODUCT_ROWS_ACCELERATOR = 2048
# Prototypes of one product that is added to a gradient: what does not fit is a second copy of that gradient.
PRODUCT_PROTOTYPES = 8192


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

    Logits, softmax, assignments and their gradients exist for a few rows at a time; the gradients of bottleneck and
    prototypes are computed in the forward pass, where the logits are at hand, so nothing is computed twice.

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
    wants_gradient: bool

    def replace_by_gradient(self, logits: Float[Tensor, "m k"], first_row: int) -> Float[Tensor, " m"]:
        """Return each row's loss; the logits (already over the temperature) become their gradient if it is wanted."""
        losses = logits.new_empty(len(logits))
        for part in row_chunks(logits.shape[0], logits.shape[1], logits.device):
            rows = slice(first_row + part.start, first_row + part.stop)
            losses[part] = self._chunk(logits[part], self.target_rows[rows], self.weights[rows])
        return losses

    def _chunk(self, logits: Tensor, target_rows: Tensor, weights: Tensor) -> Tensor:
        targets = self.targets
        scales = targets.row_scale[target_rows] * weights  # [m, r]
        assigned = targets.kernel[target_rows[:, 0]].mul_(scales[:, :1])
        for other in range(1, target_rows.shape[1]):
            assigned.addcmul_(targets.kernel[target_rows[:, other]], scales[:, other, None])
        assigned.mul_(targets.column_scale)
        # Less the row's maximum, in the assignment's product too: large logits would cost digits in both terms.
        logits.sub_(logits.amax(1, keepdim=True))
        agreement: Tensor = torch.linalg.vecdot(assigned, logits)
        total_weight: Tensor = weights.sum(1)
        normaliser = logits.exp_().sum(1)
        if self.wants_gradient:
            logits.mul_((total_weight / normaliser)[:, None]).sub_(assigned)
        return total_weight * normaliser.log() - agreement


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
        wants_gradient = any(ctx.needs_input_grad[:2])
        comparison = _Comparison(targets, target_rows, weights, wants_gradient)
        by_row = bottleneck.new_empty(len(bottleneck), dtype=torch.float32)
        scaled = bottleneck / temperature
        grad_bottleneck = torch.empty_like(bottleneck) if wants_gradient else None
        grad_prototypes: Tensor | None = None
        step = PRODUCT_ROWS.get(bottleneck.device.type, PRODUCT_ROWS_ACCELERATOR)
        for start in range(0, len(bottleneck), step):
            rows = slice(start, min(start + step, len(bottleneck)))
            logits = product(scaled[rows], prototypes).float()
            by_row[rows] = comparison.replace_by_gradient(logits, start)
            if grad_bottleneck is not None:
                grad_bottleneck[rows] = product(logits.to(prototypes.dtype), prototypes.t())
                grad_prototypes = _add_product(grad_prototypes, logits, scaled[rows])
        if grad_bottleneck is not None:
            if grad_prototypes is None:
                grad_prototypes = torch.zeros_like(prototypes)
            ctx.gradients = (grad_bottleneck.div_(temperature), grad_prototypes)
        ctx.mark_non_differentiable(by_row)
        return by_row.sum(), by_row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Taken out of the context and scaled in place: a second copy of the prototypes' gradient is never needed.
        grad_bottleneck, grad_prototypes = ctx.gradients
        ctx.gradients = None
        factor = grads[0]
        return grad_bottleneck.mul_(factor), grad_prototypes.mul_(factor), None, None, None, None


def _add_product(total: Tensor | None, gradient: Tensor, features: Tensor) -> Tensor:
    """Return total + gradient^T features in float32; the first product starts the total."""
    dtype = torch.float32 if features.device.type == "cpu" else features.dtype
    gradient, features = gradient.to(dtype), features.to(dtype)
    if total is None:
        return product(gradient.t(), features.t()).float()
    for start in range(0, len(total), PRODUCT_PROTOTYPES):
        part = slice(start, start + PRODUCT_PROTOTYPES)
        total[part].add_(product(gradient[:, part].t(), features.t()))
    return total
