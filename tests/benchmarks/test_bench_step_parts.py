"""The benchmark itself runs; its figures are printed by the script and not asserted here."""

from meddino_pretrain.bench.step import StepSize

from tests.benchmarks.bench_step_parts import as_table, backbone_parts, loss_parts, update_parts


def test_as_table__one_line_for_each_thing():
    size = StepSize("vitnano8", batch=2, global_px=32, local_px=16, num_local=2, prototypes=64)
    lines = list(as_table([*backbone_parts(size, compiled=False), *loss_parts(size), *update_parts(size)], repeats=1))
    assert len(lines) == 10
    assert all(float(line.split()[-5 if line.endswith("-") else -6]) >= 0 for line in lines[1:])
