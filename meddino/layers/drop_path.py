"""Which samples drop path leaves out: a pure function of seed, step and the samples' numbers in the global batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from meddino.core.seeds import derive_seed, torch_rng
from meddino.layers.packing import KeptSamples


@dataclass(frozen=True)
class CropIndices:
    """Where the crops of one group stand in the global batch.

    Attributes:
        indices: For each crop held here, its number among all crops of the group over all processes and
            accumulation steps (crop-major: crop * global_batch + sample).
        total: Number of crops of the group in the whole optimizer step.
    """

    indices: tuple[int, ...]
    total: int

    @staticmethod
    def of_samples(crops: int, samples: Sequence[int], global_batch: int) -> "CropIndices":
        """Number the crops of some samples.

        Args:
            crops: Crops of this group per sample (2 global ones, for example).
            samples: The samples held here, each in [0, global_batch).
            global_batch: Samples in the whole optimizer step.
        """
        indices = tuple(crop * global_batch + sample for crop in range(crops) for sample in samples)
        return CropIndices(indices, crops * global_batch)


@dataclass(frozen=True)
class DropPathPlan:
    """The random choices of one training forward.

    The dropped subset is drawn over the whole batch and each process computes its own part of it, so one process, many
    processes and gradient accumulation drop the same samples and weight the others alike: a kept residual is
    multiplied by (crops in the whole batch) / (kept crops in the whole batch).

    Attributes:
        seed: The run's seed.
        step: Optimizer step.
        groups: One entry for each crop group that the forward gets.
    """

    seed: int
    step: int
    groups: tuple[CropIndices, ...]

    @staticmethod
    def from_generator(rng: torch.Generator | None, batches: Sequence[int]) -> "DropPathPlan":
        """Draw a seed for a batch that stands alone.

        Args:
            rng: Generator on the CPU; torch's default one if None.
            batches: Number of crops in each group.
        """
        seed = int(torch.randint(2**62, (), generator=rng))
        return DropPathPlan(seed, 0, tuple(CropIndices(tuple(range(batch)), batch) for batch in batches))

    def rope_rng(self, group: int) -> torch.Generator:
        """Return the generator of a group's coordinate augmentation; the same on every process."""
        return torch_rng(self.seed, "rope", self.step, group)

    def kept_samples(self, depth: int, rate: float, device: torch.device) -> list[KeptSamples]:
        """Draw the kept samples of every branch of every block.

        Args:
            depth: Number of blocks.
            rate: Share of samples left out of each residual branch, in [0, 1).
            device: Where the indices are wanted.

        Returns:
            For each block, the kept samples of attention, then those of the perceptron. At least one crop of the whole batch is
            kept; this process's share of a group may be empty.
        """
        kept: list[list[torch.Tensor]] = []
        scales = []
        for number, group in enumerate(self.groups):
            count = max(int(group.total * (1 - rate)), 1)
            scales.append(group.total / count)
            present = torch.tensor(group.indices, dtype=torch.int64)
            rng = torch.Generator().manual_seed(derive_seed(self.seed, "drop_path", self.step, number))
            orders = [torch.randperm(group.total, generator=rng)[:count] for _ in range(2 * depth)]
            kept.append([_positions(order, present, group.total) for order in orders])
        # All indices travel to the device in one copy.
        sizes = [len(index) for indices in kept for index in indices]
        flat = torch.split(torch.cat([index for indices in kept for index in indices]).to(device, non_blocking=True), sizes)
        return [
            KeptSamples(tuple(flat[group * 2 * depth + branch] for group in range(len(kept))), tuple(scales))
            for branch in range(2 * depth)
        ]


def _positions(kept: torch.Tensor, present: torch.Tensor, total: int) -> torch.Tensor:
    is_kept = torch.zeros(total, dtype=torch.bool)
    is_kept[kept] = True
    return is_kept[present].nonzero().flatten()
