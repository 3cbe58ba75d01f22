"""Sinkhorn-Knopp against the steps written out in float64, and where float32 would give NaN."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from meddino.losses import sinkhorn
from meddino.losses.sinkhorn import row_chunks, sinkhorn_knopp, sinkhorn_targets


def slow(logits, temperature, iterations=3):
    """RECIPE's sentence, in float64: exp, divide by the sum, then rows and columns in turn."""
    q = torch.exp((logits.double() - logits.double().max()) / temperature).t()
    prototypes, count = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        for row in range(prototypes):
            q[row] = q[row] / q[row].sum() / prototypes
        for column in range(count):
            q[:, column] = q[:, column] / q[:, column].sum() / count
    return (q * count).t()


@pytest.mark.parametrize(("rows", "prototypes", "temperature"), [(8, 30, 0.07), (5, 3, 0.3), (1, 4, 0.1)])
def test_sinkhorn_knopp__equals_the_slow_loop(rows, prototypes, temperature):
    logits = torch.randn(rows, prototypes)
    found = sinkhorn_knopp(logits, temperature)
    torch.testing.assert_close(found.double(), slow(logits, temperature), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(rows), atol=1e-5, rtol=0)


def test_sinkhorn_knopp__two_by_two_by_hand():
    # q = [[1, 2], [3, 4]] / 10; one round: rows to 1/2 each, then columns to 1/2 each, times n = 2.
    logits = torch.log(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))  # [sample, prototype]
    first = torch.tensor([[1 / 3, 3 / 7], [2 / 3, 4 / 7]])
    expected = first / first.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn_knopp(logits, 1.0, iterations=1), expected)


def test_sinkhorn_knopp__does_not_overflow():
    logits = torch.randn(6, 20) * 3 + 5
    found = sinkhorn_knopp(logits, 0.04)
    expected = slow(logits, 0.04)
    assert expected.isfinite().all()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-3)


def test_sinkhorn_knopp__does_not_underflow():
    # One sample and one prototype lie 250 temperatures below the maximum: with only that subtracted, whole rows are 0.
    logits = torch.randn(4, 6)
    logits[0] -= 10.0
    logits[:, 2] -= 10.0
    found = sinkhorn_knopp(logits, 0.04)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), slow(logits, 0.04), atol=1e-4, rtol=1e-3)


def test_sinkhorn_targets__many_chunks_and_parts(monkeypatch):
    logits = torch.randn(7, 12)
    whole = sinkhorn_targets(logits, 0.1)
    monkeypatch.setitem(sinkhorn.CHUNK_ELEMENTS, "cpu", 24)
    pieces = sinkhorn_targets(logits, 0.1)
    torch.testing.assert_close(pieces.probabilities(), whole.probabilities())
    torch.testing.assert_close(whole.rows(2, 5).probabilities(), whole.probabilities()[2:5])
    torch.testing.assert_close(whole.at(torch.tensor([6, 0])).probabilities(), whole.probabilities()[[6, 0]])
    torch.testing.assert_close(whole.probabilities(slice(1, 3)), whole.probabilities()[1:3])
    assert len(whole.rows(2, 5)) == 3


def test_sinkhorn_targets__overwrite_takes_the_memory_and_gives_the_same():
    logits = torch.randn(5, 8)
    kept = logits.clone()
    expected = sinkhorn_knopp(logits, 0.1)
    assert torch.equal(logits, kept)
    targets = sinkhorn_targets(logits, 0.1, overwrite=True)
    assert targets.kernel.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(targets.probabilities(), expected)


def test_sinkhorn_targets__uneven_parts_on_two_processes_equal_the_whole(monkeypatch):
    # Two threads stand for two processes; the collectives meet at a barrier.
    barrier, said = threading.Barrier(2), {}

    def collect(combine):
        def together(values):
            said[threading.get_ident()] = values.clone()
            barrier.wait()
            result = combine(torch.stack(list(said.values())))
            barrier.wait()
            return result

        return together

    logits = torch.randn(7, 12)
    expected = sinkhorn_knopp(logits, 0.1)
    monkeypatch.setattr(sinkhorn, "all_reduce_sum", collect(lambda stacked: stacked.sum(0)))
    monkeypatch.setattr(sinkhorn, "all_reduce_max", collect(lambda stacked: stacked.amax(0)))
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda part: sinkhorn_knopp(part, 0.1), [logits[:5], logits[5:]]))
    torch.testing.assert_close(torch.cat(parts), expected)


def test_sinkhorn_targets__no_rows():
    assert sinkhorn_targets(torch.zeros(0, 5), 0.1).probabilities().shape == (0, 5)


def test_sinkhorn_targets__bfloat16_logits():
    logits = torch.randn(4, 9).bfloat16()
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.1), sinkhorn_knopp(logits.float(), 0.1))


@pytest.mark.parametrize(("temperature", "iterations"), [(0.0, 3), (0.1, 0)])
def test_sinkhorn_targets__refuses(temperature, iterations):
    with pytest.raises(ValueError, match=f"not {iterations} and {temperature}"):
        sinkhorn_targets(torch.zeros(2, 2), temperature, iterations)


def test_row_chunks__cover_all_rows():
    parts = list(row_chunks(10, 2**17, torch.device("cpu")))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(10))
    assert len(parts) == 5
