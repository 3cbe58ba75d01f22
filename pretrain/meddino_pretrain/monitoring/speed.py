"""How much arithmetic a step is, and how near to the machine's best it runs."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from meddino.core.device import Machine
from meddino_pretrain.data.batches import Batch

# Small enough to cost a quarter of a second on a laptop, large enough to reach its peak; on an accelerator launching that
# would take longer than the product.
PEAK_SIDE, PEAK_SIDE_ACCELERATOR = 1024, 8192
PEAK_REPEATS = 5


class SpeedMeter:
    """Counts the operations of this process's steps, once for each set of view sizes."""

    def __init__(self, count: Callable[[Batch], float], peak: float) -> None:
        """Take what counts.

        Args:
            count: Operations of a micro-batch; `Method.flops`.
            peak: Operations a second that this machine reaches in a large product; see `measure_peak`.
        """
        self.count, self.peak = count, peak
        self._counted: dict[tuple[int, ...], float] = {}

    def figures(self, batches: Sequence[Batch], step_s: float) -> dict[str, float]:
        """Return the TFLOP/s of a step on this process and its share of the measured peak."""
        tflops = sum(self._flops(batch) for batch in batches) / step_s / 1e12
        return {"tflops": tflops, "share_of_peak": tflops * 1e12 / self.peak}

    def _flops(self, batch: Batch) -> float:
        # Without what else a batch holds: the number of masked patches differs from batch to batch by a little.
        key = tuple(side for shape in batch.shapes.values() for side in shape)
        if key not in self._counted:
            self._counted[key] = self.count(batch)
        return self._counted[key]


def parameter_counts(network: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each part of a network (fvcore's count; shared ones count once)."""
    from fvcore.nn import parameter_count

    counts = parameter_count(network)
    return {name: int(counts[name]) for name, _ in network.named_children()}


def measure_peak(machine: Machine) -> float:
    """Return the operations a second that torch.mm reaches in the arithmetic of training."""
    with torch.no_grad():
        return product_speed(machine, torch.mm, PEAK_SIDE_ACCELERATOR if machine.is_accelerator else PEAK_SIDE)


def product_speed(machine: Machine, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], side: int) -> float:
    """Return how many operations a second a large product reaches in the arithmetic of training."""
    left, right = (torch.randn(side, side, device=machine.device, dtype=machine.compute_dtype) for _ in range(2))
    multiply(left, right)
    times = []
    for _ in range(PEAK_REPEATS):
        machine.synchronize()
        start = time.perf_counter()
        multiply(left, right)
        machine.synchronize()
        times.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(times)
