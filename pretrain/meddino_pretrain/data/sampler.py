"""Which slice comes when: a pure function of the seed and the global sample number.

Nothing here knows of workers, and ranks and micro-batches only choose which samples of a step they take. So a run
resumed anywhere, with any number of processes, goes on through the same slices in the same order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from meddino.core.errors import ConfigError
from meddino.core.seeds import derive_seed, shuffled_index


@dataclass(frozen=True)
class SampleOrder:
    """An endless shuffled walk over a corpus, cut into steps.

    Attributes:
        seed: The stage's seed.
        size: Slices in the corpus.
        global_batch: Slices in one optimizer step, over all ranks and micro-batches.
    """

    seed: int
    size: int
    global_batch: int

    def slice_of(self, number: int) -> int:
        """Return the slice (row of `slices.parquet`) at a global sample number: `step * global_batch + sample`."""
        return shuffled_index(number, self.size, derive_seed(self.seed, "order"))

    def fallbacks(self, number: int) -> Iterator[int]:
        """Yield what is taken at a global sample number, should its slice be corrupt: every slice once, shuffled."""
        walk = derive_seed(self.seed, "stand-in", number)
        for attempt in range(self.size):
            yield shuffled_index(attempt, self.size, walk)

    def numbers(self, step: int, samples: range) -> range:
        """Return the global numbers of some samples of a step."""
        start = step * self.global_batch
        return range(start + samples.start, start + samples.stop)

    def slices_for_step(self, step: int) -> list[int]:
        """Return the slices of one step in the order of their numbers."""
        return [self.slice_of(number) for number in self.numbers(step, range(self.global_batch))]


@dataclass(frozen=True)
class BatchShare:
    """The samples of every step that one rank takes, and how it cuts them into micro-batches.

    Ranks take neighbouring blocks, and micro-batches neighbouring parts of a block: gathering the ranks' micro-batches in
    the order (rank, micro-batch) gives the samples 0, 1, 2, ... again.

    Attributes:
        global_batch: Slices in one optimizer step.
        rank: This process's number.
        world_size: Number of processes.
        accumulation: Micro-batches in which each rank computes one step.
    """

    global_batch: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulation
        if self.global_batch % parts:
            fitting = [size for size in range(1, self.global_batch + 1) if self.global_batch % size == 0]
            near = min(fitting, key=lambda size: abs(math.log(size / parts)))
            raise ConfigError(
                f"global batch {self.global_batch} does not divide over {self.world_size} processes x {self.accumulation} "
                f"micro-batches = {parts} parts; take a number of parts that divides it (the nearest: {near}) or another batch"
            )

    @property
    def micro_batch(self) -> int:
        """Slices in one micro-batch of one rank."""
        return self.global_batch // (self.world_size * self.accumulation)

    def samples(self, micro_step: int) -> range:
        """Return this rank's samples in one micro-batch, by their numbers within the step.

        Args:
            micro_step: Number of the micro-batch within the step, 0 to `accumulation` - 1.
        """
        start = (self.rank * self.accumulation + micro_step) * self.micro_batch
        return range(start, start + self.micro_batch)
