"""Which slice comes when: a pure function of the seed and the global sample number.

Nothing here knows of workers, and ranks and micro-batches only choose which samples of a step they take. So a run
resumed anywhere, with any number of processes, goes on through the same slices in the same order.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import ConfigError
from meddino.core.seeds import derive_seed, numpy_rng, shuffled_index
from meddino.data.corpus import Corpus
from meddino_pretrain.run.config import SamplingConfig

# Samples after which the shares of all groups are what their weights say.
CYCLE = 10_000


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

    def is_repeat(self, number: int) -> bool:
        """Tell whether a sample's slice came before in its pass over as many samples as the corpus has slices: never here."""
        return False

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


@dataclass(frozen=True)
class WeightedOrder(SampleOrder):
    """An endless walk that takes turns between groups of slices, each shuffled on its own.

    Within every `CYCLE` samples each group comes as often as its share says; within a group every slice comes once before
    any comes again. A function of the seed and the sample's number alone, as `SampleOrder`.

    Attributes:
        groups: Slices of each group.
        turns: [CYCLE] the group of each sample of a cycle.
        before: [CYCLE] how often that group came earlier in the cycle.
        counts: How often each group comes in a cycle.
    """

    groups: tuple[NDArray[np.int64], ...]
    turns: NDArray[np.int64]
    before: NDArray[np.int64]
    counts: NDArray[np.int64]

    def slice_of(self, number: int) -> int:
        """Return the slice at a global sample number."""
        group, turn = self._turn(number)
        members = self.groups[group]
        return int(members[shuffled_index(turn, len(members), derive_seed(self.seed, "order", group))])

    def is_repeat(self, number: int) -> bool:
        """Tell whether its group has shown all of its slices since the pass over the corpus began."""
        group, turn = self._turn(number)
        return turn - self._turns_before(group, number // self.size * self.size) >= len(self.groups[group])

    def _turn(self, number: int) -> tuple[int, int]:
        cycle, place = divmod(number, CYCLE)
        group = int(self.turns[place])
        return group, cycle * int(self.counts[group]) + int(self.before[place])

    def _turns_before(self, group: int, number: int) -> int:
        cycle, place = divmod(number, CYCLE)
        return cycle * int(self.counts[group]) + int((self.turns[:place] == group).sum())

    def fallbacks(self, number: int) -> Iterator[int]:
        """Yield what is taken should the slice be corrupt: every slice that has a weight once, shuffled."""
        members = np.concatenate(self.groups)
        walk = derive_seed(self.seed, "stand-in", number)
        for attempt in range(len(members)):
            yield int(members[shuffled_index(attempt, len(members), walk)])


def sample_order(corpus: Corpus, sampling: SamplingConfig, seed: int, global_batch: int) -> SampleOrder:
    """Return the order in which a stage sees a corpus; without weights every slice comes once before any comes again.

    Args:
        corpus: One, or several that are read as one.
        sampling: The weights.
        seed: The stage's seed.
        global_batch: Slices in one optimizer step.

    Raises:
        ConfigError: A weight is given for a corpus, data set or modality that is not there, or for a name that two corpora
            have, or nothing has a weight.
    """
    if not (sampling.corpus or sampling.dataset or sampling.modality or sampling.balance != "none"):
        return SampleOrder(seed, len(corpus), global_batch)
    names = _names(corpus)
    weight = np.ones(len(corpus))
    if sampling.balance != "none":
        _, kind_of, counts = np.unique(names[sampling.balance], return_inverse=True, return_counts=True)
        weight /= counts[kind_of.reshape(-1)]
    for given in _given_weights(corpus, sampling, names):
        weight *= given
    kinds = np.stack([np.unique(names[kind], return_inverse=True)[1].reshape(-1) for kind in names], axis=1)
    _, group_of = np.unique(kinds, axis=0, return_inverse=True)
    found = [np.flatnonzero(group_of.reshape(-1) == group) for group in range(int(group_of.max()) + 1)]
    groups = [members for members in found if weight[members[0]] > 0]
    if not groups:
        raise ConfigError("corpus.sampling gives every slice the weight 0; give one a weight above 0")
    shares = np.array([weight[members].sum() for members in groups])
    counts = _turns(shares / shares.sum())
    turns = numpy_rng(seed, "groups").permutation(np.repeat(np.arange(len(groups)), counts))
    before = np.zeros(CYCLE, dtype=np.int64)
    for group in range(len(groups)):
        places = np.flatnonzero(turns == group)
        before[places] = np.arange(len(places))
    return WeightedOrder(seed, len(corpus), global_batch, tuple(groups), turns, before, counts)


def slices_left_out(corpus: Corpus, sampling: SamplingConfig) -> NDArray[np.bool_]:
    """Return which slices, in the order of the corpus, never come: those of a weight of 0.

    Raises:
        ConfigError: As for `sample_order`.
    """
    out = np.zeros(len(corpus), dtype=np.bool_)
    if sampling.zero_weights:
        for given in _given_weights(corpus, sampling, _names(corpus)):
            out |= given == 0
    return out


def _given_weights(
    corpus: Corpus, sampling: SamplingConfig, names: Mapping[str, NDArray[Any]]
) -> Iterator[NDArray[np.float64]]:
    """Yield every slice's weight by its corpus, by its data set and by its modality; see `sample_order`."""
    folders = [PurePosixPath(part.location).name for part in corpus.parts]
    shared = [name for name in sampling.corpus if folders.count(name) > 1]
    if shared:
        raise ConfigError(
            f"corpus.sampling.corpus.{shared[0]}: {folders.count(shared[0])} corpora have a folder of this name; rename one"
        )
    for kind, weights in sampling.by_kind.items():
        yield _weights_of(names[kind], weights, f"corpus.sampling.{kind}")


def _turns(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return how often each group comes in a cycle: rounded so that they add up, and none is forgotten."""
    exact = shares * (CYCLE - len(shares))
    turns = np.floor(exact).astype(np.int64)
    missing = CYCLE - len(shares) - int(turns.sum())
    turns[np.argsort(turns - exact, kind="stable")[:missing]] += 1
    return turns + 1


def _names(corpus: Corpus) -> dict[str, NDArray[Any]]:
    """Return the corpus, the data set and the modality of every slice."""
    parts, datasets = [], []
    for part in corpus.parts:
        rows = part.volumes.select(["volume_id", "dataset"]).to_pylist()
        of_volume = {row["volume_id"]: row["dataset"] for row in rows}
        datasets += [of_volume[volume] for volume in part.slices.column("volume_id").to_pylist()]
        parts += [PurePosixPath(part.location).name] * len(part)
    modalities = corpus.slices.column("modality").to_pylist()
    return {"corpus": np.array(parts), "dataset": np.array(datasets), "modality": np.array(modalities)}


def _weights_of(names: NDArray[Any], weights: Mapping[str, float], key: str) -> NDArray[np.float64]:
    there = sorted(set(names.tolist()))
    unknown = [name for name in weights if name not in there]
    if unknown:
        raise ConfigError(f"{key}.{unknown[0]}: there is no '{unknown[0]}'; there: {', '.join(there)}")
    return np.array([weights.get(name, 1.0) for name in there])[np.searchsorted(there, names)]
