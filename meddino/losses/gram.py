"""Gram anchoring: the student's patches keep the similarities to each other that a Gram teacher's patches have."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from meddino.core.device import at_least_float32

# Similarities computed at once: those of one image on a CPU, of 25 images of 48 x 48 patches on an accelerator.
ELEMENTS = {"cpu": 1}
ELEMENTS_ACCELERATOR = 2**27
Negatives = Literal["keep", "remove", "remove_teacher"]


def gram_loss(
    student_tokens: Float[Tensor, "batch patches dim"],
    teacher_tokens: Float[Tensor, "teacher_batch teacher_patches teacher_dim"],
    *,
    per_image: bool = True,
    normalise: bool = True,
    negatives: Negatives = "keep",
) -> Float[Tensor, ""]:
    """Return the mean squared difference between the two similarity matrices of patch tokens.

    Args:
        student_tokens: The student's patch tokens.
        teacher_tokens: The Gram teacher's on the same grid; no gradient flows to them.
        per_image: Compare patches within each image; otherwise those of the whole batch with each other, which takes
            (batch * patches) squared numbers.
        normalise: Cosine similarities; otherwise scalar products.
        negatives: "keep" them; "remove" sets negative similarities of both to zero; "remove_teacher" those of the
            teacher only.

    Raises:
        ValueError: If the tokens differ in shape.

    Source: Siméoni et al. 2025 (DINOv3), section 4. Memory holds the matrices of one image at a time, of some on an
    accelerator.
    """
    if student_tokens.shape != teacher_tokens.shape:
        raise ValueError(
            f"student tokens are {list(student_tokens.shape)}, the Gram teacher's {list(teacher_tokens.shape)}; "
            "resize its map to the student's grid first"
        )
    with torch.autocast(student_tokens.device.type, enabled=False):
        student, teacher = at_least_float32(student_tokens), at_least_float32(teacher_tokens.detach())
        if normalise:
            student, teacher = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
        if not per_image:
            student, teacher = student.flatten(0, 1)[None], teacher.flatten(0, 1)[None]
        loss: Tensor = _GramDifference.apply(student, teacher, negatives)
        return loss


def resize_patch_map(
    patches: Float[Tensor, "batch dim rows columns"], size: tuple[int, int]
) -> Float[Tensor, "batch dim new_rows new_columns"]:
    """Resize a map of patch tokens to another grid: bicubic, corners not aligned, no antialiasing.

    Args:
        patches: Map of patch tokens, such as the Gram teacher's at twice the resolution.
        size: Rows and columns wanted.
    """
    return functional.interpolate(patches, size=size, mode="bicubic", align_corners=False, antialias=False)


def _stretches(batch: int, patches: int, device: torch.device) -> list[int] | list[slice]:
    """Return the images to take at once: one on a CPU, as many as keep an accelerator busy there."""
    elements = ELEMENTS.get(device.type, ELEMENTS_ACCELERATOR)
    step = max(1, elements // patches**2)
    return list(range(batch)) if step == 1 else [slice(start, start + step) for start in range(0, batch, step)]


class _GramDifference(torch.autograd.Function):
    """Mean squared difference of s s^T and t t^T; the gradient is computed on the way, one image at a time."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, negatives: Negatives) -> Tensor:
        batch, patches, _ = student.shape
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if wants_gradient else None
        total = student.new_zeros(())
        count = batch * patches * patches
        for images in _stretches(batch, patches, student.device):
            own, aim = student[images], teacher[images] @ teacher[images].mT
            similarity = own @ own.mT
            positive = None
            if negatives != "keep":
                aim.clamp_(min=0.0)
            if negatives == "remove":
                positive = similarity > 0
                similarity.clamp_(min=0.0)
            difference = similarity.sub_(aim)
            total += difference.square().sum()
            if gradient is not None:
                if positive is not None:
                    difference.mul_(positive)
                # d/ds of sum (s s^T - a)^2 is 4 (s s^T - a) s: the difference is symmetric.
                torch.matmul(difference, own, out=gradient[images])
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(4 / count))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None
