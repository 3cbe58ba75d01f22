"""Which volumes of a corpus a run learns from: all but those of which every slice has the weight 0."""

from collections.abc import Set as AbstractSet

import numpy as np
import pyarrow as pa

from meddino.data.corpus import Corpus
from meddino.data.overlap import content_key
from meddino_pretrain.data.sampler import slices_left_out
from meddino_pretrain.run.config import SamplingConfig


def trained_volumes(corpus: Corpus, sampling: SamplingConfig, known: AbstractSet[str] = frozenset()) -> pa.Table:
    """Return the rows of a corpus's volume manifest that are learnt from.

    A duplicate goes with the copy of it that was kept, whatever its own data set's weight: its scan is seen in that guise.

    Args:
        corpus: One, or several that are read as one.
        sampling: The weights.
        known: Content keys of volumes that were learnt from before under other weights, or that a list names already.
    """
    out = slices_left_out(corpus, sampling)
    if not out.any():
        return corpus.volumes
    learnt: list[bool] = []
    start = 0
    for part in corpus.parts:
        ids, never = part.slices.column("volume_id").to_numpy(), out[start : start + len(part)]
        left_out = set(ids[never]) - set(ids[~never])
        rows = part.volumes.select(["volume_id", "duplicate_of", "content_hash"]).to_pylist()
        learnt += [
            (row["duplicate_of"] or row["volume_id"]) not in left_out or content_key(row["content_hash"] or "") in known
            for row in rows
        ]
        start += len(part)
    return corpus.volumes.filter(pa.array(np.array(learnt)))
