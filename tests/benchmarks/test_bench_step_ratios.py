"""The benchmark itself: both sides compute the same numbers, and the loss part's memory stays below half.

Times are printed by the script and not asserted here: tests share their cores with whatever runs beside them.
"""

from meddino_pretrain.bench.step import StepSize

from tests.benchmarks.bench_step_ratios import as_table, measure_all


def test_measure_all__memory_of_the_loss_part_is_below_half():
    size = StepSize("vitnano8", batch=4, global_px=224, local_px=16, num_local=4, prototypes=4096)
    rows = measure_all(size, repeats=1, whole=False)
    assert [row["what"] for row in rows] == ["loss part", "loss part with Gram"]
    assert all(row["own_mib"] <= 0.5 * row["plain_mib"] for row in rows)
    assert "ratio" in as_table(rows)


def test_measure_all__both_sides_take_the_same_step():
    size = StepSize("vitnano8", batch=2, global_px=32, local_px=16, num_local=2, prototypes=256)
    assert [row["what"] for row in measure_all(size, repeats=1, whole=True)][-1] == "whole step"
