"""Graph matching as a loss: how far the best matching of two views' graphs is from each node matched with itself."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from meddino.losses.assignment import MatchingProblems, match_graphs


@dataclass(frozen=True)
class MatchingSetting:
    """How a matching is found and differentiated.

    Attributes:
        step_size: Lambda: how far costs are moved along the loss's gradient to see where the matching goes.
        margin: Taken off the affinity of each node with itself, which makes the right matching harder.
        restarts: See `match_graphs`.
        threads: See `match_graphs`.
    """

    step_size: float = 80.0
    margin: float = 0.0
    restarts: int = 1
    threads: int = 1


@dataclass(frozen=True)
class EdgeAffinities:
    """Edges of two graphs and how alike they are.

    Attributes:
        affinity: Of the edges (i, r) and (a, q).
        heads: Nodes at which the edges of the one graph end.
        other_heads: Nodes at which the edges of the other graph end.
    """

    affinity: Float[Tensor, "b n k n k"]
    heads: Int[Tensor, "b n k"]
    other_heads: Int[Tensor, "b n k"]


def matching_loss(
    vertex: Float[Tensor, "b n n"],
    edges: EdgeAffinities | None,
    noise: Float[Tensor, "b n n"] | None,
    setting: MatchingSetting,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Return the Hamming distance of each matching from the identity, and the share of nodes matched with themselves.

        v = matching(vertex + noise - margin * eye, edges)
        loss = (v * (1 - eye) + eye * (1 - v)).sum()
        gradient of vertex = (v - matching(vertex + noise - margin * eye - step_size * (1 - 2 * eye), edges)) / step_size

    and the same difference of v[i, a] * v[j, b] for the affinity of the edges ij and ab. The second matching is the identity
    wherever `step_size` is large beside the affinities, as it is at the paper's 80: where that is certain it is not searched.

    Args:
        vertex: Affinities of nodes; row and column i belong to the same image.
        edges: None matches nodes alone.
        noise: Added to the affinities of nodes in both matchings; Gumbel noise makes the gradient that of a smoothed loss.
        setting: Step size, margin and search; see `MatchingSetting`.

    Source: LVM-Med (Nguyen et al. 2023) with implicit maximum likelihood (Niepert et al. 2021). The noise is on nodes alone
    (perturbations of low order). The step is taken along the gradient of the sum over entries, 1 - 2 eye, whatever the
    loss is multiplied by afterwards.
    """
    if edges is None:
        loss, share = _Matching.apply(vertex, None, None, None, noise, setting)
    else:
        loss, share = _Matching.apply(vertex, edges.affinity, edges.heads, edges.other_heads, noise, setting)
    return loss, share


class _Matching(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        vertex: Tensor,
        edge: Tensor | None,
        heads: Tensor | None,
        other_heads: Tensor | None,
        noise: Tensor | None,
        setting: MatchingSetting,
    ) -> tuple[Tensor, Tensor]:
        problems = _on_host(vertex, edge, heads, other_heads, noise, setting.margin)
        nodes = vertex.shape[1]
        found = match_graphs(problems, setting.restarts, setting.threads)
        right = (found == np.arange(nodes)).sum(axis=1)
        ctx.has_edges = edge is not None
        pulled = _pulled_matchings(problems, setting)
        one, other = np.eye(nodes)[found], np.eye(nodes)[pulled]
        gradient = torch.from_numpy((one - other) / setting.step_size)
        kept = [gradient.to(vertex)]
        if edge is not None:
            both = _matched_edges(problems, one) - _matched_edges(problems, other)
            kept.append(torch.from_numpy(both / setting.step_size).to(edge))
        ctx.save_for_backward(*kept)
        share = torch.from_numpy(right / nodes).to(vertex)
        loss = torch.from_numpy(2.0 * (nodes - right)).to(vertex)
        ctx.mark_non_differentiable(share)
        return loss, share

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_vertex, *of_edge = ctx.saved_tensors
        scale = gradients[0].view(-1, 1, 1)
        edge = scale[..., None, None] * of_edge[0] if ctx.has_edges else None
        return scale * of_vertex, edge, None, None, None, None


def _on_host(
    vertex: Tensor, edge: Tensor | None, heads: Tensor | None, other_heads: Tensor | None, noise: Tensor | None, margin: float
) -> MatchingProblems:
    perturbed = vertex.detach() if noise is None else vertex.detach() + noise
    if margin:
        perturbed = perturbed - margin * torch.eye(vertex.shape[1], device=vertex.device, dtype=vertex.dtype)
    parts = (perturbed, None if edge is None else edge.detach(), heads, other_heads)
    return MatchingProblems(*(None if part is None else part.cpu().numpy() for part in parts))  # type: ignore[arg-type]


def _pulled_matchings(problems: MatchingProblems, setting: MatchingSetting) -> NDArray[np.int64]:
    nodes = problems.vertex.shape[1]
    pulled = np.tile(np.arange(nodes), (len(problems), 1))
    open_ones = ~identity_is_certain(problems, setting.step_size)
    if open_ones.any():
        chosen = problems[open_ones]
        moved = chosen.vertex - setting.step_size * (1 - 2 * np.eye(nodes, dtype=chosen.vertex.dtype))
        pulled[open_ones] = match_graphs(chosen.with_vertex(moved), setting.restarts, setting.threads)
    return pulled


def identity_is_certain(problems: MatchingProblems, step_size: float) -> Bool[NDArray[np.bool_], " b"]:
    """Return where the identity is the best matching once costs are moved by `step_size` along the loss's gradient.

    A matching that moves d nodes loses 2 d step_size by that. It gains at most d times the largest difference within a row
    to its own entry, and twice the largest affinity of edges for each edge that begins or ends in a moved node.
    """
    vertex = problems.vertex
    own = np.einsum("bii->bi", vertex)
    gain = (vertex - own[:, :, None]).max(axis=(1, 2))
    if problems.edge is not None and problems.heads is not None and problems.other_heads is not None:
        nodes, degree = problems.heads.shape[1:]
        touching = np.stack(
            [
                [np.bincount(each.reshape(-1), minlength=nodes).max() for each in one]
                for one in (problems.heads, problems.other_heads)
            ]
        ).max(axis=0)
        gain = gain + 2 * np.abs(problems.edge).max(axis=(1, 2, 3, 4)) * (degree + touching)
    certain: NDArray[np.bool_] = gain < 2 * step_size
    return certain


def _matched_edges(problems: MatchingProblems, matching: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 for each pair of edges whose tails and heads are both matched, else 0; [b, n, k, n, k]."""
    assert problems.heads is not None and problems.other_heads is not None
    graphs = np.arange(len(matching)).reshape(-1, 1, 1, 1, 1)
    heads = matching[graphs, problems.heads[:, :, :, None, None], problems.other_heads[:, None, None, :, :]]
    matched: NDArray[np.float64] = matching[:, :, None, :, None] * heads
    return matched
