"""Collectives over two processes against what one process computes."""

import json

import pytest
import torch

from meddino.distributed.collectives import (
    all_gather_strings,
    all_gather_with_grad,
    all_reduce_max,
    all_reduce_mean,
    all_reduce_sum,
    any_rank,
    broadcast_object,
    is_main,
)

TWO = """
    import json, torch
    from meddino.distributed.collectives import *
    from meddino.distributed.collectives import all_reduce_mean, all_gather_strings
    from meddino.distributed.process_group import start_distributed
    with start_distributed(60) as place:
        mine = torch.tensor([1.0, 2.0]) * (place.rank + 1)
        kept = mine.clone()
        result = {"sum": all_reduce_sum(mine).tolist(), "max": all_reduce_max(-mine).tolist()}
        result["mean"] = all_reduce_mean(mine).tolist()
        result["untouched"] = torch.equal(mine, kept)
        result["strings"] = all_gather_strings([f"r{place.rank}"])
        result["object"] = broadcast_object({"from": place.rank} if is_main() else None)
        result["any"] = [any_rank(False), any_rank(place.rank == 1)]
        rows = torch.arange(4.0).view(2, 2) + 10 * place.rank
        rows.requires_grad_(True)
        everyone = all_gather_with_grad(rows)
        result["everyone"] = everyone.tolist()
        # Each process weighs all rows by its own number + 1; a row's gradient sums what both say.
        (everyone * (place.rank + 1) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])).sum().backward()
        result["grad"] = rows.grad.tolist()
        print(json.dumps(result))
"""


def test_collectives__alone_are_the_identity():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert all_gather_with_grad(values) is values
    assert all_reduce_sum(values) is values and all_reduce_max(values) is values
    assert all_reduce_mean(values).tolist() == [1.0, 2.0]
    assert broadcast_object("x") == "x" and all_gather_strings(["a"]) == ["a"]
    assert is_main() and any_rank(True) and not any_rank(False)


@pytest.mark.distributed
def test_collectives__two_processes(run_ranks):
    first, second = (json.loads(output) for output in run_ranks(TWO))
    for result in (first, second):
        assert result["sum"] == [3.0, 6.0] and result["max"] == [-1.0, -2.0] and result["mean"] == [1.5, 3.0]
        assert result["untouched"] and result["strings"] == ["r0", "r1"] and result["object"] == {"from": 0}
        assert result["any"] == [False, True]
        assert result["everyone"] == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert first["grad"] == [[3, 3], [6, 6]] and second["grad"] == [[9, 9], [12, 12]]
