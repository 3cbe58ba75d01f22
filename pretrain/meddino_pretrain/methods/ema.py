"""The teacher follows the student as an exponential moving average."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Move every parameter of the teacher: `momentum * teacher + (1 - momentum) * student`.

    Args:
        student: The trained modules.
        teacher: The same structure.
        momentum: In [0, 1].
    """
    # FSDP2 cuts student and teacher alike, so each process averages its own part.
    sources = [_own_part(parameter) for parameter in student.parameters()]
    targets = [_own_part(parameter) for parameter in teacher.parameters()]
    torch._foreach_lerp_(targets, sources, 1.0 - momentum)  # one pass over memory, not two


def _own_part(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
