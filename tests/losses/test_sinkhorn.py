"""Sinkhorn-Knopp against the steps written out in float64, and where float32 would give NaN."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from meddino.losses import sinkhorn
from meddino.losses.sinkhorn import TeacherLogits, row_chunks, sinkhorn_targets
from tests.losses.conftest import assignments


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
def test_sinkhorn_targets__equals_the_slow_loop(rows, prototypes, temperature):
    logits = torch.randn(rows, prototypes)
    found = assignments(logits, temperature)
    torch.testing.assert_close(found.double(), slow(logits, temperature), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(rows), atol=1e-5, rtol=0)


def test_sinkhorn_targets__two_by_two_by_hand():
    # q = [[1, 2], [3, 4]] / 10; one round: rows to 1/2 each, then columns to 1/2 each, times n = 2.
    logits = torch.log(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))  # [sample, prototype]
    first = torch.tensor([[1 / 3, 3 / 7], [2 / 3, 4 / 7]])
    expected = first / first.sum(1, keepdim=True)
    torch.testing.assert_close(assignments(logits, 1.0, iterations=1), expected)


def test_sinkhorn_targets__does_not_overflow():
    logits = torch.randn(6, 20) * 3 + 5
    found = assignments(logits, 0.04)
    expected = slow(logits, 0.04)
    assert expected.isfinite().all()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-3)


def test_sinkhorn_targets__does_not_underflow():
    # One sample and one prototype lie 250 temperatures below the maximum: with only that subtracted, whole rows are 0.
    logits = torch.randn(4, 6)
    logits[0] -= 10.0
    logits[:, 2] -= 10.0
    found = assignments(logits, 0.04)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), slow(logits, 0.04), atol=1e-4, rtol=1e-3)


def test_sinkhorn_targets__many_chunks_and_parts(monkeypatch):
    logits = torch.randn(7, 12)
    whole = sinkhorn_targets(TeacherLogits(logits), 0.1)
    monkeypatch.setitem(sinkhorn.CHUNK_ELEMENTS, "cpu", 24)
    pieces = sinkhorn_targets(TeacherLogits(logits), 0.1)
    torch.testing.assert_close(pieces.probabilities(), whole.probabilities())
    torch.testing.assert_close(whole.rows(2, 5).probabilities(), whole.probabilities()[2:5])
    torch.testing.assert_close(whole.probabilities(torch.tensor([6, 0])), whole.probabilities()[[6, 0]])
    torch.testing.assert_close(whole.probabilities(slice(1, 3)), whole.probabilities()[1:3])
    assert len(whole.rows(2, 5)) == 3


@pytest.mark.parametrize("rows", [7, 0])
def test_sinkhorn_targets__computed_again_in_chunks_are_those_that_are_kept(monkeypatch, rows):
    logits = TeacherLogits(torch.randn(rows, 5), torch.randn(12, 5))
    kept = sinkhorn_targets(logits, 0.1)
    monkeypatch.setitem(sinkhorn.KEPT_BYTES, "cpu", 0 if rows else -1)
    monkeypatch.setitem(sinkhorn.CHUNK_ELEMENTS, "cpu", 24)
    again = sinkhorn_targets(logits, 0.1)
    assert kept.kept is not None and again.kept is None
    torch.testing.assert_close(again.probabilities(), kept.probabilities(), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(again.rows(2, 5).probabilities(slice(0, 2)), kept.probabilities()[2:5][:2])
    torch.testing.assert_close(kept.probabilities(), assignments(logits.bottleneck @ logits.prototypes.t(), 0.1))
    monkeypatch.undo()
    given_up = sinkhorn_targets(logits, 0.1, give_up_kernel=True)
    assert given_up.kept is None
    torch.testing.assert_close(given_up.probabilities(), kept.probabilities(), atol=1e-7, rtol=1e-6)


def test_sinkhorn_targets__hold_no_more_than_a_chunk_of_logits(monkeypatch):
    monkeypatch.setitem(sinkhorn.KEPT_BYTES, "cpu", 0)
    monkeypatch.setitem(sinkhorn.CHUNK_ELEMENTS, "cpu", 4 * 64)
    largest, own = [], TeacherLogits.rows

    def noted(self, rows):
        found = own(self, rows)
        largest.append(found.numel())
        return found

    monkeypatch.setattr(TeacherLogits, "rows", noted)
    sinkhorn_targets(TeacherLogits(torch.randn(40, 5), torch.randn(64, 5)), 0.1)
    assert max(largest) == 4 * 64 and sum(largest) == 5 * 40 * 64  # five passes over all rows


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
    expected = assignments(logits, 0.1)
    monkeypatch.setattr(sinkhorn, "all_reduce_sum", collect(lambda stacked: stacked.sum(0)))
    monkeypatch.setattr(sinkhorn, "all_reduce_max", collect(lambda stacked: stacked.amax(0)))
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda part: assignments(part, 0.1), [logits[:5], logits[5:]]))
    torch.testing.assert_close(torch.cat(parts), expected)


def test_sinkhorn_targets__no_rows():
    assert sinkhorn_targets(TeacherLogits(torch.zeros(0, 5)), 0.1).probabilities().shape == (0, 5)


def test_sinkhorn_targets__bfloat16_logits():
    logits = torch.randn(4, 9).bfloat16()
    torch.testing.assert_close(assignments(logits, 0.1), assignments(logits.float(), 0.1))


@pytest.mark.parametrize(("temperature", "iterations"), [(0.0, 3), (0.1, 0)])
def test_sinkhorn_targets__refuses(temperature, iterations):
    with pytest.raises(ValueError, match=f"not {iterations} and {temperature}"):
        sinkhorn_targets(TeacherLogits(torch.zeros(2, 2)), temperature, iterations)


def test_row_chunks__cover_all_rows():
    parts = list(row_chunks(10, 2**17, torch.device("cpu")))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(10))
    assert len(parts) == 5
