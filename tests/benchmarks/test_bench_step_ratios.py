"""The benchmark itself: both sides compute the same numbers, and the loss part's memory stays below half.

Times are printed by the script and not asserted here: tests share their cores with whatever runs beside them.
"""

from tests.benchmarks.bench_step_ratios import as_table, measure_all
from tests.benchmarks.test_bench_step_parts import small_size


def test_measure_all__memory_of_the_loss_part_is_below_half():
    crops = ["--global-size", "224", "--local-size", "16", "--locals", "4"]
    size = small_size("--batch", "4", *crops, "--prototypes", "4096")
    rows = measure_all(size, repeats=1, whole=False)
    assert [row["what"] for row in rows] == ["loss part", "loss part with Gram"]
    assert all(row["own_mib"] <= 0.5 * row["plain_mib"] for row in rows)
    assert "ratio" in as_table(rows)


def test_measure_all__both_sides_take_the_same_step():
    size = small_size("--batch", "2", "--global-size", "32", "--local-size", "16", "--locals", "2", "--prototypes", "256")
    assert [row["what"] for row in measure_all(size, repeats=1, whole=True)][-1] == "whole step"
