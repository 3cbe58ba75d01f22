"""Nearest neighbours on frozen features: weighted kNN, ML-kNN for several labels, and retrieval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Truth = NDArray[np.int64]
Probabilities = NDArray[np.float64]
_CHUNK = 1024


def nearest(
    queries: Float[Tensor, "q dim"], references: Float[Tensor, "r dim"], count: int, dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "q k"], Tensor]:
    """Return the cosine similarities and numbers of each query's nearest references, nearest first.

    Similarities are computed in `dtype` and in chunks; equal ones are ordered by the reference's number.
    """
    reference = functional.normalize(references.to(dtype), dim=1)
    count = min(count, len(reference))
    values, numbers = [], []
    for chunk in torch.split(functional.normalize(queries.to(dtype), dim=1), _CHUNK):
        similarity, order = _largest(chunk @ reference.T, count)
        values.append(similarity)
        numbers.append(order)
    return torch.cat(values), torch.cat(numbers)


def _largest(similarity: Float[Tensor, "q r"], count: int) -> tuple[Float[Tensor, "q k"], Tensor]:
    """Return each row's largest entries and their columns, of equal ones those of the lower columns, without sorting all."""
    if 4 * count >= similarity.shape[1]:
        values, order = similarity.sort(dim=1, descending=True, stable=True)
        return values[:, :count], order[:, :count]
    threshold = similarity.topk(count, dim=1).values[:, -1:]
    chosen = similarity >= threshold
    crowded = (chosen.sum(1) > count).nonzero().flatten()
    if len(crowded):
        above, equal = similarity[crowded] > threshold[crowded], similarity[crowded] == threshold[crowded]
        chosen[crowded] = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    columns = chosen.nonzero()[:, 1].reshape(len(similarity), count)  # row by row, ascending
    values, order = similarity.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def knn_probabilities(
    train: Float[Tensor, "n dim"],
    labels: Truth,
    queries: Float[Tensor, "q dim"],
    *,
    classes: int,
    neighbours: Sequence[int],
    temperature: float = 0.07,
    dtype: torch.dtype = torch.float64,
) -> dict[int, NDArray[Any]]:
    """Return class probabilities by weighted votes of the nearest training cases, for several k at once.

    Args:
        train: Features; L2-normalised here.
        labels: [n] class numbers, or [n, labels] of 0, 1, -1: then each label is voted on by itself, and neighbours whose
            label is not known do not vote.
        queries: Features.
        classes: Number of classes (or labels).
        neighbours: Values of k; one above n takes all.
        temperature: A neighbour's vote weighs exp(cosine / temperature).
        dtype: Of the similarities; float32 halves the time of many queries.

    Source: Wu et al. 2018, as in DINO and DINOv2.
    """
    similarity, numbers = nearest(queries, train, max(neighbours), dtype)
    # The largest is subtracted: the weights' ratio stays and nothing overflows at small temperatures.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    truth = torch.from_numpy(labels)[numbers]
    result = {}
    for k in neighbours:
        weight, near = weights[:, :k], truth[:, :k]
        if labels.ndim == 2:
            known = weight[..., None] * (near != -1)
            total = known.sum(1)
            votes = torch.where(total > 0, (known * (near == 1)).sum(1) / total.clamp(min=1e-300), 0.5)
        else:
            votes = weight.new_zeros(len(queries), classes).scatter_add(1, near, weight)
            votes = votes / votes.sum(1, keepdim=True)
        result[k] = votes.numpy()
    return result


def ml_knn_probabilities(
    train: Float[Tensor, "n dim"],
    labels: Truth,
    queries: Float[Tensor, "q dim"],
    *,
    neighbours: int,
    smoothing: float = 1.0,
) -> Probabilities:
    """Return the probability of each label by ML-kNN: Bayes' rule over how many neighbours carry the label.

    Args:
        train: Features; L2-normalised here.
        labels: [n, labels] of 0, 1 and -1 (not known: counted as absent).
        queries: Features.
        neighbours: k; one above n - 1 takes n - 1.
        smoothing: Laplace smoothing.

    Source: Zhang and Zhou 2007; distances are cosine here.
    """
    truth = (labels == 1).astype(np.int64)
    count = min(neighbours, len(train) - 1)
    prior = (smoothing + truth.sum(0)) / (2 * smoothing + len(truth))
    _, own = nearest(train, train, count + 1)
    # A training case is no neighbour of itself; among equal vectors it may not stand first.
    near = np.stack([row[row != place][:count] for place, row in enumerate(own.numpy())])
    among = truth[near].sum(1)  # [n, labels]: neighbours that carry the label
    with_label = np.zeros((truth.shape[1], count + 1))
    without = np.zeros_like(with_label)
    for label in range(truth.shape[1]):
        with_label[label] = np.bincount(among[truth[:, label] == 1, label], minlength=count + 1)
        without[label] = np.bincount(among[truth[:, label] == 0, label], minlength=count + 1)
    likelihood = (smoothing + with_label) / (smoothing * (count + 1) + with_label.sum(1, keepdims=True))
    likelihood_not = (smoothing + without) / (smoothing * (count + 1) + without.sum(1, keepdims=True))
    _, numbers = nearest(queries, train, count)
    hits = truth[numbers.numpy()].sum(1)
    columns = np.arange(truth.shape[1])
    yes = prior * likelihood[columns, hits]
    no = (1 - prior) * likelihood_not[columns, hits]
    probabilities: Probabilities = yes / (yes + no)
    return probabilities


def retrieval_per_case(
    queries: Float[Tensor, "q dim"], query_labels: Truth, gallery: Float[Tensor, "g dim"], gallery_labels: Truth, k: int = 10
) -> dict[str, NDArray[np.float64]]:
    """Measure how well each query finds cases of its own class in a gallery (of other patients).

    Returns:
        For each query: `precision@1`, `precision@k` and `average_precision` over the whole gallery. A query whose class the
        gallery lacks is NaN. For several labels a hit shares at least one positive label.
    """
    _, order = nearest(queries, gallery, len(gallery))
    ranked = gallery_labels[order.numpy()]
    several = query_labels.ndim == 2
    hits = ((ranked == 1) & (query_labels[:, None] == 1)).any(2) if several else ranked == query_labels[:, None]
    totals = hits.sum(1)
    places = np.arange(1, hits.shape[1] + 1)
    precision = np.cumsum(hits, axis=1) / places
    found = totals > 0
    average = np.where(found, (precision * hits).sum(1) / np.maximum(totals, 1), np.nan)
    first = np.where(found, hits[:, 0], np.nan)
    return {"precision@1": first, f"precision@{k}": np.where(found, hits[:, :k].mean(1), np.nan), "average_precision": average}
