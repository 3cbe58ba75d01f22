"""Small volumes that look enough like CT to be taken for it."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

SALT = "a salt for tests only"


def make_hu(seed: int, shape: tuple[int, int, int] = (6, 64, 72)) -> np.ndarray:
    """int16 [Z, Y, X]: air, a body of fat and soft tissue, two lungs, a spine; another one for each seed."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    width, height, shift = rng.uniform(0.7, 0.85), rng.uniform(0.6, 0.75), rng.uniform(-0.08, 0.08)
    hu = np.full(shape, -1000.0)
    radius = np.hypot((x - shift) / width, y / height)
    hu[radius < 1] = -100
    hu[radius < 0.85] = 50 + 10 * rng.normal()
    for side in (-1, 1):
        centre = shift + side * rng.uniform(0.28, 0.36)
        size = rng.uniform(0.2, 0.3) * (1 + 0.3 * z)
        hu[(np.hypot((x - centre) / size, (y + 0.1) / rng.uniform(0.3, 0.45)) < 1) & (radius < 0.8)] = -830
    hu[np.hypot((x - shift) / 0.12, (y - 0.38) / 0.12) < 1] = 300
    for number in range(24):
        by, bx, bz = rng.uniform(-0.55, 0.55, size=3) * (1, 1, 1.8)
        size = rng.uniform(0.06, 0.2)
        hu[np.hypot((x - bx) / size, (y - by) / size) + np.abs(z - bz) < 1] = (120, -700, -90, 250, 40, -20)[number % 6]
    return np.rint(hu + rng.normal(0, 12, shape)).clip(-1024, 3071).astype(np.int16)


def write_volume(
    path: Path, hu: np.ndarray, spacing_mm: tuple[float, float, float] = (5.0, 4.5, 4.5), orientation: str = "LPS"
) -> Path:
    """Write [Z, Y, X] in any format SimpleITK knows by the file's ending; spacing in array order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing_mm[::-1])
    image.SetOrigin((-100.0, -120.0, 30.0))
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(path), useCompression=path.suffix != ".mhd")
    return path


@pytest.fixture(scope="session")
def salt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("salt") / "salt"
    path.write_text(SALT)
    return path


@pytest.fixture(scope="session")
def six_volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six different patients in four formats and several orientations."""
    root = tmp_path_factory.mktemp("volumes")
    names = ("a.nii.gz", "b.nii", "c.nrrd", "sub/d.mha", "sub/e.mhd", "sub/deeper/f.nii.gz")
    for seed, (name, orientation) in enumerate(zip(names, ("LPS", "RAS", "LPS", "PIR", "LAS", "RSP"), strict=True)):
        write_volume(root / name, make_hu(seed), orientation=orientation)
    return root
