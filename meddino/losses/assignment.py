"""Graph matching: the permutation of nodes that agrees best in nodes and edges (a quadratic assignment problem)."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

_ITERATIONS = 20  # of Frank-Wolfe; most problems of 16 nodes stop before the tenth
_TOLERANCE = 1e-6  # a smaller gain is rounding
_CHUNK = 8  # problems a thread takes at a time: their matrices stay in its cache


@dataclass(frozen=True)
class MatchingProblems:
    """Pairs of graphs of N nodes, each node with K edges that leave it.

    Attributes:
        vertex: Affinity of node i of the one and node a of the other graph.
        edge: Affinity of the edges (i, r) and (a, q); None where nodes alone are compared.
        heads: Nodes at which the edges of the one graph end.
        other_heads: Nodes at which the edges of the other graph end.
    """

    vertex: Float[NDArray[np.floating], "b n n"]
    edge: Float[NDArray[np.floating], "b n k n k"] | None = None
    heads: Int[NDArray[np.int64], "b n k"] | None = None
    other_heads: Int[NDArray[np.int64], "b n k"] | None = None

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.vertex)

    def with_vertex(self, vertex: NDArray[np.floating]) -> "MatchingProblems":
        """Return the same problems with other affinities of nodes."""
        return MatchingProblems(vertex, self.edge, self.heads, self.other_heads)

    def __getitem__(self, chosen: slice | NDArray[np.bool_]) -> "MatchingProblems":
        """Return some of the problems."""
        parts = (self.vertex, self.edge, self.heads, self.other_heads)
        return MatchingProblems(*(None if part is None else part[chosen] for part in parts))  # type: ignore[arg-type]


def match_graphs(problems: MatchingProblems, restarts: int = 1, threads: int = 1) -> Int[NDArray[np.int64], "b n"]:
    """Return for each node of the first graphs the node of the second ones that it is matched with.

    Maximises sum_i vertex[i, p(i)] + sum over edges (i, r), (p(i), q) of edge[i, r, p(i), q] where the heads are matched too.
    Without edges this is a linear assignment, solved exactly. With edges it is NP-hard: Frank-Wolfe over doubly stochastic
    matrices with linear assignments inside, rounded, then pairs of nodes are swapped while that gains. The best of
    `restarts` starting points counts; the first is the centre of all permutations, so no matching is preferred.

    Args:
        problems: Affinities; what is best is a function of them alone.
        restarts: Starting points, >= 1.
        threads: Worker threads.

    Source: Vogelstein et al. 2015 (FAQ) for Frank-Wolfe.
    """
    chunks = [problems[slice(start, start + _CHUNK)] for start in range(0, len(problems), _CHUNK)]
    if threads <= 1 or len(chunks) <= 1:
        return np.concatenate([_match(chunk, restarts) for chunk in chunks])
    with ThreadPoolExecutor(min(threads, len(chunks))) as pool:
        return np.concatenate(list(pool.map(lambda chunk: _match(chunk, restarts), chunks)))


def _match(problems: MatchingProblems, restarts: int) -> NDArray[np.int64]:
    if problems.edge is None:
        return _assign(problems.vertex)
    quadratic = pair_affinities(problems)
    linear = np.ascontiguousarray(problems.vertex.reshape(len(problems), -1), dtype=quadratic.dtype)
    best, highest = _search(quadratic, linear, 0)
    for restart in range(1, restarts):
        found, value = _search(quadratic, linear, restart)
        better = value > highest + _TOLERANCE
        best[better], highest[better] = found[better], value[better]
    return best


def _assign(affinity: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.stack([linear_sum_assignment(each, maximize=True)[1] for each in affinity])


def pair_affinities(problems: MatchingProblems) -> Float[NDArray[np.floating], "b m m"]:
    """Return what two pairs of nodes gain by being matched at once, M = N * N, in both orders of the two (symmetric)."""
    assert problems.edge is not None and problems.heads is not None and problems.other_heads is not None
    count, nodes, degree = problems.heads.shape
    size = nodes * nodes
    tails = (np.arange(nodes)[:, None, None, None] * nodes + np.arange(nodes)[None, None, :, None]) * size
    ends = problems.heads[:, :, :, None, None] * nodes + problems.other_heads[:, None, None]
    places = (np.broadcast_to(tails, (nodes, degree, nodes, degree))[None] + ends).reshape(count, -1)
    matrix = np.zeros((count, size * size), dtype=problems.edge.dtype)
    # An edge has one place: no two edges of a node end in the same one.
    np.put_along_axis(matrix, places, problems.edge.reshape(count, -1), axis=1)
    matrix = matrix.reshape(count, size, size)
    return matrix + matrix.transpose(0, 2, 1)


def _search(
    quadratic: NDArray[np.floating], linear: NDArray[np.floating], start: int
) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    count, size = linear.shape
    nodes = round(size**0.5)
    relaxed = _frank_wolfe(quadratic, linear, _starting_point(start, nodes).astype(linear.dtype))
    matching = _assign(relaxed.reshape(count, nodes, nodes))
    return _swap_pairs(quadratic, linear, matching)


def _starting_point(start: int, nodes: int) -> NDArray[np.float64]:
    centre = np.full((nodes, nodes), 1 / nodes)
    if start:
        # On the way to a permutation, or at it: the same in every process.
        rng = np.random.default_rng(start)
        centre += rng.choice((0.3, 0.6, 1.0)) * (np.eye(nodes)[rng.permutation(nodes)] - centre)
    return centre.reshape(-1)


def _frank_wolfe(
    quadratic: NDArray[np.floating], linear: NDArray[np.floating], start: NDArray[np.floating]
) -> NDArray[np.floating]:
    count, size = linear.shape
    nodes = round(size**0.5)
    relaxed = np.tile(start, (count, 1))
    slopes = linear + _products(quadratic, relaxed, np.arange(count))
    active = np.arange(count)
    for _ in range(_ITERATIONS):
        target = np.zeros((len(active), size), dtype=linear.dtype)
        columns = _assign(slopes[active].reshape(-1, nodes, nodes)) + nodes * np.arange(nodes)
        np.put_along_axis(target, columns, 1, axis=1)
        direction = target - relaxed[active]
        gain = (slopes[active] * direction).sum(axis=1)
        moving = gain > _TOLERANCE
        active, direction, gain = active[moving], direction[moving], gain[moving]
        if not len(active):
            break
        change = _products(quadratic, direction, active)
        curvature = 0.5 * (direction * change).sum(axis=1)
        # The objective along the line is curvature t^2 + gain t: its highest point in [0, 1].
        length = np.where(curvature < 0, np.minimum(1, gain / np.maximum(-2 * curvature, 1e-12)), 1)[:, None]
        relaxed[active] += length * direction
        slopes[active] += length * change
    return relaxed


def _products(quadratic: NDArray[np.floating], vectors: NDArray[np.floating], rows: NDArray[np.int64]) -> NDArray[np.floating]:
    # One product a problem: a stack of chosen matrices would be copied, and one product for all would round by their number.
    return np.stack([quadratic[row] @ vector for row, vector in zip(rows, vectors, strict=True)])


def _swap_pairs(
    quadratic: NDArray[np.floating], linear: NDArray[np.floating], matching: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Swap the two partners that gain most until none gains; returns the matchings and their values."""
    nodes = matching.shape[1]
    first, second = _pairs(nodes)
    values = np.empty(len(matching), dtype=linear.dtype)
    for row, (matrix, own) in enumerate(zip(quadratic, linear, strict=True)):
        partner = matching[row]
        chosen = np.arange(nodes) * nodes + partner
        inside = matrix[chosen].sum(axis=0)
        while len(first):
            slopes = own + inside
            one, two = chosen[first], chosen[second]
            other_one, other_two = first * nodes + partner[second], second * nodes + partner[first]
            # f(v + d) - f(v) = slopes d + d' Q d / 2 for d = other_one + other_two - one - two; Q has a zero diagonal.
            crossed = matrix[other_one, other_two] + matrix[one, two]
            crossed -= matrix[other_one, one] + matrix[other_one, two] + matrix[other_two, one] + matrix[other_two, two]
            gain = slopes[other_one] + slopes[other_two] - slopes[one] - slopes[two] + crossed
            best = int(gain.argmax())
            if gain[best] <= _TOLERANCE:
                break
            i, j = first[best], second[best]
            inside += matrix[other_one[best]] + matrix[other_two[best]] - matrix[one[best]] - matrix[two[best]]
            partner[i], partner[j] = partner[j], partner[i]
            chosen[i], chosen[j] = other_one[best], other_two[best]
        values[row] = own[chosen].sum() + 0.5 * inside[chosen].sum()
    return matching, values


@cache
def _pairs(nodes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pairs = np.array(list(combinations(range(nodes), 2)), dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
