"""The same random numbers in every run; what training balances, multiplied out."""

import pytest
import torch
from torch import Tensor

from meddino.losses.sinkhorn import TeacherLogits, sinkhorn_targets


def assignments(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    return sinkhorn_targets(TeacherLogits(logits), temperature, iterations).probabilities()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
