"""One procedural patient: sizes and contrast drawn at random, within what is plausible for an adult."""

from dataclasses import dataclass

import numpy as np

LABELS = {"background": 0, "lung": 1, "heart": 2, "liver": 3, "spleen": 4, "kidneys": 5, "bone": 6}


@dataclass(frozen=True)
class Patient:
    """What differs between patients. Lengths in mm, attenuation in HU.

    Ranges are those of textbooks and of non-enhanced, arterial and portal venous routine CT; they are meant to be
    plausible, not to model a population.
    """

    half_width_mm: float
    half_depth_mm: float
    fat_mm: float
    muscle_mm: float
    waist: float
    spine_y_mm: float
    vertebra_pitch_mm: float
    vertebra_radius_mm: float
    liver_scale: float
    spleen_scale: float
    kidney_scale: float
    heart_scale: float
    lung_drop_mm: float
    organ_shift_mm: tuple[float, float, float]
    arms: bool
    blood_hu: float
    liver_hu: float
    spleen_hu: float
    kidney_cortex_hu: float
    kidney_medulla_hu: float
    lung_hu: float
    bone_hu: float
    noise_hu: float
    kernel_sigma_mm: float
    circle: bool

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Patient":
        """Draw a patient."""
        stout = rng.uniform(0, 1)
        depth = 96 + 26 * stout + rng.normal(0, 3)
        blood, liver, spleen, cortex, medulla = [
            (42, 58, 48, 34, 30),  # no contrast agent
            (250, 78, 125, 180, 85),  # arterial
            (155, 112, 122, 185, 165),  # portal venous
        ][rng.integers(3)]
        return cls(
            half_width_mm=146 + 32 * stout + rng.normal(0, 5),
            half_depth_mm=depth,
            fat_mm=7 + 17 * stout + rng.uniform(-2, 4),
            muscle_mm=rng.uniform(15, 20),
            waist=rng.uniform(-0.05, 0.07),
            spine_y_mm=0.36 * depth + rng.uniform(-3, 3),
            vertebra_pitch_mm=rng.uniform(25, 31),
            vertebra_radius_mm=rng.uniform(18, 22),
            liver_scale=rng.uniform(0.88, 1.12),
            spleen_scale=rng.uniform(0.8, 1.2),
            kidney_scale=rng.uniform(0.88, 1.12),
            heart_scale=rng.uniform(0.88, 1.12),
            lung_drop_mm=rng.uniform(62, 92),
            organ_shift_mm=(rng.normal(0, 4), rng.normal(0, 4), rng.normal(0, 8)),
            arms=bool(rng.uniform() < 0.3),
            blood_hu=blood + rng.normal(0, 12),
            liver_hu=liver + rng.normal(0, 9) - 25 * (rng.uniform() < 0.15),  # one in seven has a fatty liver
            spleen_hu=spleen + rng.normal(0, 6),
            kidney_cortex_hu=cortex + rng.normal(0, 8),
            kidney_medulla_hu=medulla + rng.normal(0, 6),
            lung_hu=rng.uniform(-875, -800),
            bone_hu=rng.uniform(140, 240),
            noise_hu=rng.uniform(7, 20),
            kernel_sigma_mm=rng.uniform(0.7, 1.5),
            circle=bool(rng.uniform() < 0.4),
        )
