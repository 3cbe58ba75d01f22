"""A worker holds at most two volumes, whatever a volume is stored as; docs/curation.md has figures for 512 x 512 x 2000."""

import subprocess
import sys

import pytest

from tests.conftest import PROJECT
from tests.data_curation.peak_memory import write_tall

FIXED_BYTES = 48 << 20  # blocks of files, one slice's work, the report


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["nii", "nii.gz", "scaled", "sagittal", "nrrd", "mha", "dicom", "enhanced", "packed", "oblique"]
)
def test_build__peak_memory_is_two_volumes(tmp_path, kind):
    slices = 240
    volume = write_tall(tmp_path / "in", kind, slices)
    command = [sys.executable, "-m", "tests.data_curation.peak_memory", str(volume)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 2 * slices * 512 * 512 * 2 + FIXED_BYTES
