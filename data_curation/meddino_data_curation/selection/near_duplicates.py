"""Scans that come again in another guise: candidates from an index, then a comparison slice by slice.

Size on paper, for a million volumes of 48 looked-at slices: 12 GB of vectors, as much again while they lie in one array, 2 GB
for the one band at work, and two to three hours of one core (24 bands, each one sort and four look-ups of 48 million keys;
16,000 volumes took 100 s), against 5e11 comparisons of all pairs.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meddino_data_curation.selection.fingerprint import Fingerprint, flip_signs, flipped

BANDS = 24
BITS = 32
# (up to so many slices, least cosine, least share of slices that reach it). Copies lie above 0.97, another kernel between 0.83
# and 0.99, the most alike slices of different patients at 0.88, of whole volumes below 0.8; the fewer slices, the more
# each has to say. Measured on shared/data by tests/data_curation/test_near_duplicates.py.
RULES = ((3, 0.96, 0.5), (7, 0.93, 0.5), (10**9, 0.88, 0.6))
IN_ORDER = 0.9  # correlation of the matching slices' places
_FEW = 3
_CROWD = 400  # slices with one key: what looks like everything tells nothing
_FLIPS = ((False, False), (False, True), (True, False), (True, True))


@dataclass(frozen=True)
class Likeness:
    """Two volumes that show the same scan.

    Attributes:
        first: Index of one.
        second: Index of the other, larger than `first`.
        similarity: Mean cosine of the slices that match.
        matched: Share of the smaller volume's slices that match.
    """

    first: int
    second: int
    similarity: float
    matched: float


def find_alike(prints: Sequence[Fingerprint]) -> list[Likeness]:
    """Find all pairs of volumes that show the same scan.

    Args:
        prints: Fingerprints of the volumes.

    Returns:
        Pairs of indices, sorted.
    """
    found = []
    for first, second in sorted(candidate_pairs(prints)):
        likeness = compare(prints[first], prints[second])
        if likeness is not None:
            found.append(Likeness(first, second, *likeness))
    return found


def find_alike_between(prints: Sequence[Fingerprint], others: Sequence[Fingerprint]) -> list[Likeness]:
    """Find pairs of one volume of each list; `second` counts in the second list."""
    count = len(prints)
    found = []
    for first, second in sorted(candidate_pairs([*prints, *others])):
        if first < count <= second:
            likeness = compare(prints[first], others[second - count])
            if likeness is not None:
                found.append(Likeness(first, second - count, *likeness))
    return found


def candidate_pairs(prints: Sequence[Fingerprint]) -> set[tuple[int, int]]:
    """Return pairs of volumes of which two slices, one perhaps turned over, share a band of their random-projection bits.

    Source: Charikar 2002 (similarity by the signs of random projections), in bands as in locality-sensitive hashing.
    """
    owners = np.repeat(np.arange(len(prints)), [len(fingerprint.vectors) for fingerprint in prints])
    if len(owners) == 0:
        return set()
    vectors = np.concatenate([fingerprint.vectors for fingerprint in prints])
    pairs: set[tuple[int, int]] = set()
    for band in range(BANDS):
        # The planes must be the same on every machine and in every version of NumPy: Philox's stream is guaranteed.
        planes = np.random.Generator(np.random.Philox(key=band)).standard_normal((vectors.shape[1], BITS)).astype(np.float32)
        base = _keys(vectors, planes)
        order = np.argsort(base, kind="stable")
        for rows, cols in _FLIPS:
            # The planes are turned over, not the vectors: the same products without a second copy of all vectors.
            wanted = base if not rows and not cols else _keys(vectors, planes * flip_signs(rows, cols)[:, None])
            pairs.update(_joined(base[order], order, wanted, owners))
    return pairs


def _keys(vectors: NDArray[np.int8], planes: NDArray[np.float32]) -> NDArray[np.uint32]:
    keys = np.empty(len(vectors), dtype=np.uint32)
    powers = np.uint32(1) << np.arange(BITS, dtype=np.uint32)
    for start in range(0, len(vectors), 65536):
        signs = vectors[start : start + 65536].astype(np.float32) @ planes > 0
        keys[start : start + 65536] = (signs * powers).sum(axis=1, dtype=np.uint32)
    return keys


def _joined(
    ordered: NDArray[np.uint32], order: NDArray[np.intp], wanted: NDArray[np.uint32], owners: NDArray[np.intp]
) -> Iterator[tuple[int, int]]:
    starts = np.searchsorted(ordered, wanted, "left")
    counts = np.searchsorted(ordered, wanted, "right") - starts
    asking = np.flatnonzero((counts > 0) & (counts <= _CROWD))
    repeated = np.repeat(asking, counts[asking])
    within = np.arange(len(repeated)) - np.repeat(np.cumsum(counts[asking]) - counts[asking], counts[asking])
    answers = owners[order[starts[repeated] + within]]
    both = np.stack([np.minimum(owners[repeated], answers), np.maximum(owners[repeated], answers)], axis=1)
    for first, second in np.unique(both[both[:, 0] != both[:, 1]], axis=0):
        yield int(first), int(second)


def compare(first: Fingerprint, second: Fingerprint) -> tuple[float, float] | None:
    """Compare two volumes slice by slice, in all four ways of turning slices over, in either order.

    Spacing is not used: a file may have lost it. The slices of the smaller volume must be found in the other one, and in the
    same or the reverse order.

    Returns:
        Mean similarity of the matching slices and the share of slices that match; None if they are not the same scan.
    """
    small, large = sorted((first, second), key=lambda fingerprint: len(fingerprint.vectors))
    if len(small.vectors) == 0:
        return None
    references = _unit(large.vectors)
    best: tuple[float, float] | None = None
    for rows, cols in _FLIPS:
        likeness = _unit(flipped(small.vectors, rows, cols)) @ references.T
        verdict = _verdict(likeness)
        if verdict is not None and (best is None or verdict > best):
            best = verdict
    return best


def _verdict(likeness: NDArray[np.float32]) -> tuple[float, float] | None:
    nearest, similarity = likeness.argmax(axis=1), likeness.max(axis=1)
    _, least, least_share = next(rule for rule in RULES if len(nearest) <= rule[0])
    matching = similarity >= least
    share = float(matching.mean())
    if share < least_share:
        return None
    if matching.sum() > _FEW:
        places = nearest[matching]
        if places.std() == 0 or abs(float(np.corrcoef(np.arange(len(places)), places)[0, 1])) < IN_ORDER:
            return None
    return round(float(similarity[matching].mean()), 4), round(share, 4)


def _unit(vectors: NDArray[np.int8]) -> NDArray[np.float32]:
    wide = vectors.astype(np.float32)
    unit: NDArray[np.float32] = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-6)
    return unit


def groups(count: int, links: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the connected groups of two and more among `count` items."""
    leader = list(range(count))

    def find(item: int) -> int:
        while leader[item] != item:
            leader[item] = leader[leader[item]]
            item = leader[item]
        return item

    for first, second in links:
        leader[max(find(first), find(second))] = min(find(first), find(second))
    members: Mapping[int, list[int]] = defaultdict(list)
    for item in range(count):
        members[find(item)].append(item)
    return [group for group in members.values() if len(group) > 1]
