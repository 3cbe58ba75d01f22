"""From painted anatomy to what a scanner would give: kernel, noise, field of view, int16 HU."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from meddino.core.seeds import numpy_rng
from meddino_data_curation.phantom.anatomy import Anatomy
from meddino_data_curation.phantom.canvas import Grid
from meddino_data_curation.phantom.patient import Patient


@dataclass(frozen=True)
class Scan:
    """One scanned patient.

    Attributes:
        hu: int16 [Z, Y, X], axes to Superior, Posterior, Left.
        labels: uint8 [Z, Y, X], numbers of `patient.LABELS`.
        spacing_mm: [Z, Y, X].
        first_mm: Position [Z, Y, X] of the first voxel.
    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    first_mm: tuple[float, float, float]


def scan_patient(seed: int, role: str, number: int) -> Scan:
    """Make one patient and scan it.

    Args:
        seed: The cohort's seed.
        role: "ct" or "segmentation"; patients of different roles are different patients.
        number: Which patient of that role.
    """
    rng = numpy_rng(seed, "phantom", role, number)
    patient = Patient.draw(rng)
    size = int(rng.choice([160, 176, 192, 208]))
    field_mm = 2 * patient.half_width_mm + rng.uniform(24, 60)
    spacing = (float(rng.choice([6.0, 6.5, 7.0, 7.5, 8.0])), *(2 * (round(field_mm / size, 3),)))
    bottom, top = rng.uniform(-172, -158), rng.uniform(95, 120)
    shape = (int((top - bottom) // spacing[0]) + 1, size, size)
    first = (bottom, -(size - 1) / 2 * spacing[1] + rng.uniform(0, 14), -(size - 1) / 2 * spacing[2] + rng.uniform(-6, 6))
    canvas = Anatomy(patient, Grid.regular(shape, spacing, first), rng).paint()
    return Scan(_reconstruct(canvas.hu, patient, spacing, rng), canvas.labels, spacing, first)


def _reconstruct(
    hu: NDArray[np.float32], patient: Patient, spacing_mm: tuple[float, float, float], rng: np.random.Generator
) -> NDArray[np.int16]:
    """Blur with the kernel, add noise that the kernel has shaped and that rises to the centre, cut the field of view."""
    sigma = (0.25, patient.kernel_sigma_mm / spacing_mm[1], patient.kernel_sigma_mm / spacing_mm[2])
    blurred = ndimage.gaussian_filter(hu, sigma, truncate=3.0)
    noise = ndimage.gaussian_filter(
        rng.standard_normal(hu.shape, dtype=np.float32), (0.0, 0.7 * sigma[1], 0.7 * sigma[2]), truncate=3.0
    )
    rows, cols = (np.linspace(-1, 1, size, dtype=np.float32) for size in hu.shape[1:])
    radius_squared = rows[:, None] ** 2 + cols[None, :] ** 2
    blurred += noise * (patient.noise_hu / noise.std()) * (1.25 - 0.75 * np.minimum(radius_squared, 1))
    clipped = np.clip(np.rint(blurred), -1024, 3071).astype(np.int16)
    if patient.circle:
        clipped[:, radius_squared > 1] = -1024
    return clipped
