"""The benchmark itself runs and tells what it says; speeds are printed by the script and not asserted here."""

from meddino_data_curation.cli import main as curate

from meddino.data.corpus import Corpus
from tests.benchmarks.bench_curation import as_table, enlarged, measure
from tests.benchmarks.bench_random_access import measure as random_access
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


def test_random_access__counts_pixels(tmp_path):
    (tmp_path / "salt").write_text("a salt for tests only")
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    more = ["workers=1", f"privacy.salt_file={tmp_path / 'salt'}"]
    assert curate(["build", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *more]) == 0
    found = random_access(Corpus(tmp_path / "out"), reads=20, repeats=1)
    assert (found["slices"], found["pixels_a_slice"]) == (6, 64 * 72)
    assert found["slices_per_cpu_s"] > 0
