"""Features in two dimensions, coloured by label: t-SNE."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import ConfigError
from meddino.core.html_charts import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST_CASES = 4


def tsne(features: NDArray[np.float64], seed: int = 0) -> NDArray[np.float32]:
    """Return two coordinates a case.

    Args:
        features: [n, D]; L2-normalised here, so distances are those of kNN.
        seed: Of the embedding; equal seeds give equal pictures.

    Raises:
        ConfigError: Fewer than four cases.
    """
    from sklearn.manifold import TSNE

    if len(features) < FEWEST_CASES:
        raise ConfigError(f"t-SNE of {len(features)} cases; at least {FEWEST_CASES} are needed")
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, (len(unit) - 1) / 3)
    places: NDArray[np.float32] = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(unit)
    return places


def embedding_figure(places: NDArray[np.floating[Any]], labels: Sequence[str], title: str) -> "Figure":
    """Draw cases as dots coloured by label."""
    drawing, axes = new_figure(7.0, 6.0)
    for label in dict.fromkeys(sorted(labels)):
        mask = np.array([one == label for one in labels])
        axes.scatter(places[mask, 0], places[mask, 1], s=14, alpha=0.8, label=f"{label} ({mask.sum()})")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    return drawing
