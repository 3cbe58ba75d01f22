"""How much arithmetic a step is, and how near to the machine's best it runs."""

from collections.abc import Sequence

import torch

from meddino.core.device import Machine
from meddino_pretrain.bench.step import model_flops, peak_flops
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.methods.dinov3.network import DINOv3Network

# Small enough to cost a quarter of a second on a laptop, large enough to reach its peak.
PEAK_SIDE = 1024


class SpeedMeter:
    """Counts the operations of this process's steps, once for each set of crop sizes."""

    def __init__(self, network: DINOv3Network, gram: bool, peak: float) -> None:
        """Take what is counted.

        Args:
            network: The student's architecture; may lie on the meta device.
            gram: Whether there is a Gram teacher.
            peak: Operations a second that this machine reaches in a large product; see `measure_peak`.
        """
        self.network, self.gram, self.peak = network, gram, peak
        self._counted: dict[tuple[int, ...], float] = {}

    def figures(self, batches: Sequence[Batch], step_s: float) -> dict[str, float]:
        """Return the TFLOP/s of a step on this process and its share of the measured peak."""
        tflops = sum(self._flops(batch) for batch in batches) / step_s / 1e12
        return {"tflops": tflops, "share_of_peak": tflops * 1e12 / self.peak}

    def _flops(self, batch: Batch) -> float:
        # Without the number of masked patches, which differs from batch to batch by a little.
        key = (*batch.global_crops.shape, *batch.local_crops.shape)
        if key not in self._counted:
            self._counted[key] = model_flops(self.network, batch, self.gram)
        return self._counted[key]


def parameter_counts(network: DINOv3Network) -> dict[str, int]:
    """Return the number of parameters of the backbone and of each head (fvcore's count; shared ones count once)."""
    from fvcore.nn import parameter_count

    counts = parameter_count(network)
    return {name: int(counts[name]) for name, _ in network.named_children()}


def measure_peak(machine: Machine) -> float:
    """Return the operations a second that torch.mm reaches in the arithmetic of training."""
    with torch.no_grad():
        return peak_flops(machine, PEAK_SIDE)["mm"]
