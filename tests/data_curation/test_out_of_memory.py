"""A volume for which the memory does not reach is refused; the others of the build are not."""

import gzip
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from meddino_data_curation.cli import main

from meddino.volumes.formats import itk
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.test_bad_files import nifti_header
from tests.data_curation.test_build import run_build
from tests.data_curation.test_held_out import rows_by_place

MEMORY_BYTES = 4 << 30
COMMAND = [sys.executable, "-c", "import sys; from meddino_data_curation.cli import main; sys.exit(main())"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_build__a_volume_too_large_for_the_memory_is_refused_and_the_run_goes_on(tmp_path, salt_file, workers):
    source, out = tmp_path / "in", tmp_path / "out"
    write_volume(source / "good.nii.gz", make_hu(0))
    with gzip.open(source / "large.nii.gz", "wb", compresslevel=1) as stream:
        stream.write(nifti_header((900, 900, 900), datatype=64, bits=64))
        stream.write(np.random.default_rng(0).bytes(6 << 20))  # as large as a packed file of that many zeros
    words = ["build", str(source), "--out", str(out), f"workers={workers}", f"privacy.salt_file={salt_file}"]
    done = subprocess.run(
        [*COMMAND, *words],
        # Each arena reserves 64 MiB of addresses, and torch, which webdataset loads, maps 3 GiB of them for CUDA.
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_by_place(out)
    assert rows["good.nii.gz"]["status"] == "accepted"
    assert rows["large.nii.gz"]["status"] == "rejected"
    assert "not enough memory" in rows["large.nii.gz"]["reason"]
    assert main(["verify", str(out)]) == 0


def test_build__itk_without_memory_is_no_damaged_file(tmp_path, salt_file, monkeypatch):
    """ITK says it with a RuntimeError, like everything else."""
    write_volume(tmp_path / "in" / "a.nrrd", make_hu(0))
    write_volume(tmp_path / "in" / "b.nii.gz", make_hu(1))

    class Full(sitk.ImageFileReader):
        def Execute(self, *_):  # noqa: N802
            raise RuntimeError("itkImportImageContainer.hxx:179:\nFailed to allocate memory for image.")

    monkeypatch.setattr(itk.sitk, "ImageFileReader", Full)
    assert run_build(tmp_path / "in", tmp_path / "out", salt_file, "workers=1") == 0
    rows = rows_by_place(tmp_path / "out")
    assert "not enough memory" in rows["a.nrrd"]["reason"]
    assert rows["b.nii.gz"]["status"] == "accepted"
