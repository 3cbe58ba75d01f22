"""Randomness as a pure function of a seed and a position.

No generator state is ever saved: whoever knows the run's seed and where it stands (step, sample number, purpose) gets
the same numbers, whatever the number of workers or processes and however often the run was resumed.
"""

import hashlib

import numpy as np
import torch

Position = int | str


def derive_seed(seed: int, *position: Position) -> int:
    """Mix a seed and a position into a non-negative 63-bit seed.

    Args:
        seed: The run's seed.
        position: What the numbers are for and where, e.g. `("crop", sample_number, crop_number)`. Strings and integers
            are told apart, and `("a", 1)` differs from `("a1",)`.
    """
    text = "\x1f".join([repr(int(seed)), *(repr(part) if isinstance(part, str) else repr(int(part)) for part in position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_rng(seed: int, *position: Position) -> np.random.Generator:
    """Return a fresh NumPy generator for a position; see `derive_seed`."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, *position)))


def torch_rng(seed: int, *position: Position) -> torch.Generator:
    """Return a fresh torch generator for a position, on the CPU; see `derive_seed`."""
    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, *position))
    return generator


def shuffled_index(number: int, size: int, seed: int) -> int:
    """Return the item that stands at place `number` of an endless shuffled walk over `size` items.

    Every stretch `[k * size, (k + 1) * size)` is a permutation of all items, another one for each k. Nothing is kept in
    memory and any place is reached in constant time: a four-round Feistel network over the smallest even number of
    bits that holds `size`, walked on until it lands inside (Black and Rogaway 2002, cycle walking).

    Args:
        number: Place in the walk, >= 0.
        size: Number of items, >= 1.
        seed: Seed of the walk.

    Raises:
        ValueError: If `size` < 1 or `number` < 0.
    """
    if size < 1 or number < 0:
        raise ValueError(f"need size >= 1 and number >= 0, not size={size}, number={number}")
    epoch, value = divmod(number, size)
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    keys = _round_keys(seed, epoch)
    while True:
        left, right = value >> half_bits, value & half_mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & half_mask)
        value = (left << half_bits) | right
        if value < size:
            return value


def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(derive_seed(seed, "shuffle", epoch, round_number) for round_number in range(4))


def _mix(value: int, key: int) -> int:
    # The finaliser of splitmix64: every output bit depends on every input bit.
    value = (value + key) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
