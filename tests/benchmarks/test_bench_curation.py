"""The benchmark itself runs and tells what it says; speeds are printed by the script and not asserted here."""

from tests.benchmarks.bench_curation import as_table, enlarged, measure
from tests.data_curation.conftest import make_hu, write_volume


def test_measure__counts_what_was_built_and_prints_its_ratios(tmp_path):
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0, (9, 100, 104)))
    source = enlarged([tmp_path / "in"], tmp_path / "big", 128)
    measured = measure([source], tmp_path, [1], repeats=1)
    assert (measured.volumes, measured.slices) == (2, 18)  # the volume and its DICOM twin
    assert measured.voxel_mb == 2e-6 * 18 * 128 * 128
    assert measured.floor.cpu_s > 0
    assert 0 < measured.builds[1].end_s < measured.builds[1].cpu_s
    assert "of floor" in as_table(measured)
