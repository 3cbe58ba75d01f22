"""The organs, painted one over another: trunk, lungs, mediastinum, abdomen, skeleton, table."""

import copy
from collections.abc import Sequence

import numpy as np

from meddino_data_curation.phantom.canvas import REACH, Canvas, Field, Grid, Inside
from meddino_data_curation.phantom.patient import LABELS, Patient

FAT_HU = -100.0
MUSCLE_HU = 55.0
CARTILAGE_HU = 110.0
GAS_HU = -960.0
DIAPHRAGM_MM = 3.0
DEFORMATION_MM = 5.5  # nobody is an ellipsoid: without this, patients are near duplicates of one another
RIB_PITCH_MM = 29.0
RIB_SLOPE_MM = 75.0  # how much lower a rib's front end is than its head


class Anatomy:
    """Paints one patient on a grid."""

    def __init__(self, patient: Patient, grid: Grid, rng: np.random.Generator) -> None:
        """Prepare the surfaces that several organs share.

        Args:
            patient: Sizes and attenuations.
            grid: Where the voxels are.
            rng: Draws the textures and the bowel.
        """
        self.patient, self.rng = patient, rng
        self.scanner = grid
        self.grid = grid = grid.deformed(rng, DEFORMATION_MM, 85.0, rng.normal(0, 4))
        self.canvas = Canvas.empty(grid)
        self.wobble = grid.smooth_noise(rng, 30.0) * np.float32(0.06)  # makes ellipsoids look grown
        self.texture = grid.smooth_noise(rng, 9.0)
        first, second = grid.smooth_noise(rng, 16.0), grid.smooth_noise(rng, 16.0)
        self.vessel_distance = first * first + second * second  # small along curves in space: where two noises vanish
        self.skin = self._trunk(0.0)
        self.muscle = self._trunk(patient.fat_mm)
        self.cavity = self._trunk(patient.fat_mm + patient.muscle_mm)
        self.dome = self._diaphragm()
        self.below: Inside = (grid.z < self.dome - DIAPHRAGM_MM) & (self.cavity < 0.97)

    def paint(self) -> Canvas:
        """Paint everything and return the canvas, still without blur and noise."""
        self._table()
        self._trunk_wall()
        self._bowel()
        self._lungs()
        self._mediastinum()
        self._stomach()
        self._liver()
        self._spleen()
        self._kidneys()
        self._great_vessels()
        self._ribs()
        self._sternum()
        self._spine()
        if self.patient.arms:
            self._arms()
        return self.canvas

    def _near(self, centre_mm: Sequence[float], reach_mm: Sequence[float]) -> "Anatomy":
        """Return the part within a distance along x, y, z of a place: painting there costs less and gives the same.

        What is painted in it must not reach further; an ellipsoid reaches `REACH` times its largest radius.
        """
        box = self.grid.box(centre_mm, reach_mm)
        part = copy.copy(self)
        part.canvas = self.canvas.cut(box)
        part.grid = part.canvas.grid
        part.wobble, part.texture, part.vessel_distance, part.skin, part.muscle, part.cavity, part.dome, part.below = (
            np.broadcast_to(field, self.grid.shape)[box]
            for field in (
                self.wobble,
                self.texture,
                self.vessel_distance,
                self.skin,
                self.muscle,
                self.cavity,
                self.dome,
                self.below,
            )
        )
        return part

    def _trunk(self, depth_mm: float) -> Field:
        """Normalised radius of the trunk's outline moved inwards by a depth; 1 on the outline."""
        patient, grid = self.patient, self.grid
        level = np.clip((grid.z + 160.0) / 260.0, 0.0, 1.0)
        width = patient.half_width_mm * (1 - patient.waist * np.sin(np.pi * level) ** 2) - depth_mm
        front = patient.half_depth_mm * (1.0 + 0.05 * (1 - level)) - depth_mm
        back = patient.half_depth_mm * 0.94 - 0.8 * depth_mm
        depth = np.where(grid.y < 0, front, back)
        radius: Field = ((np.abs(grid.x) / width) ** 2.3 + (np.abs(grid.y) / depth) ** 2.3) ** np.float32(1 / 2.3)
        return radius.astype(np.float32)

    def _diaphragm(self) -> Field:
        """Height of the diaphragm [1, Y, X] in mm: two domes that fall off to the sides and to the back."""
        patient, grid = self.patient, self.grid
        half = patient.half_width_mm
        domes = []
        for side, top in ((-1.0, 0.0), (1.0, -12.0)):
            across = (grid.x - side * 0.42 * half) / (0.55 * half)
            along = (grid.y + 0.1 * patient.half_depth_mm) / (0.75 * patient.half_depth_mm)
            domes.append(top - patient.lung_drop_mm * (across**2 + np.where(along > 0, 1.3, 0.35) * along**2) ** 1.2)
        saddle = -14.0 - 0.5 * np.abs(grid.x) - 0.9 * np.maximum(grid.y, 0) + 0.15 * np.minimum(grid.y, 0)  # under the heart
        surface: Field = np.maximum(np.maximum(domes[0], domes[1]), saddle).astype(np.float32)
        return surface

    def _trunk_wall(self) -> None:
        canvas = self.canvas
        canvas.paint(self.skin < 1, FAT_HU + 8 * self.texture)
        canvas.paint((self.skin < 1) & (self.skin > 1 - 2.5 / self.patient.half_depth_mm), 15.0)
        canvas.paint(self.muscle < 1, MUSCLE_HU + 10 * self.texture + 160 * np.minimum(self.wobble, 0))
        canvas.paint(self.cavity < 1, FAT_HU + 5 + 10 * self.texture)

    def _bowel(self) -> None:
        patient, rng = self.patient, self.rng
        reach = patient.half_width_mm - patient.fat_mm - patient.muscle_mm
        for _ in range(22):
            centre = (
                rng.uniform(-0.85, 0.85) * reach,
                rng.uniform(-0.75, 0.25) * patient.half_depth_mm,
                rng.uniform(-190, -75),
            )
            radii = [float(radius) for radius in rng.uniform(11, 22, size=3) * (1.0, 1.0, 1.4)]
            part = self._near(centre, (REACH * max(radii),) * 3)
            belly = (part.cavity < 0.97) & (part.grid.z < part.dome - 12)
            shape = part.grid.ellipsoid(centre, radii, (0, rng.uniform(-70, 70), 0)) + part.wobble
            part.canvas.paint((shape < 1) & belly, 45.0)
            content = rng.choice([12.0, 30.0, 60.0])
            part.canvas.paint((shape < 0.72) & belly, content + 12 * part.texture)
            if rng.uniform() < 0.4:
                part.canvas.paint((shape < 0.72) & belly & (part.grid.y < centre[1] - 0.2 * radii[1]), GAS_HU)

    def _lungs(self) -> None:
        patient, grid = self.patient, self.grid
        inside = (self.cavity < 0.96) & (grid.z > self.dome) & (np.abs(grid.x) > 3.5)
        gravity = 0.55 * (grid.y + 20.0)  # dependent lung is denser
        parenchyma = patient.lung_hu + np.clip(gravity, -40, 70) + 22 * self.texture
        self.canvas.paint(inside, parenchyma, LABELS["lung"])
        hilum = np.sqrt(((np.abs(grid.x) - 38) / 90) ** 2 + ((grid.y - 5) / 80) ** 2 + ((grid.z - 55) / 100) ** 2)
        vessels = inside & (self.vessel_distance < 0.05 * np.clip(1.25 - hilum, 0.08, 1.1))
        self.canvas.paint(vessels, min(patient.blood_hu, 120.0), LABELS["lung"])

    def _mediastinum(self) -> None:
        patient, grid, canvas = self.patient, self.grid, self.canvas
        above = (grid.z > self.dome + DIAPHRAGM_MM) & (self.cavity < 0.98)
        middle = grid.ellipsoid((4, 2, 90), (33, 0.52 * patient.half_depth_mm, 160)) + self.wobble
        canvas.paint((middle < 1) & above, FAT_HU + 30 + 15 * self.texture)
        self._heart()
        part = self._near((0, 0, 0), (70, np.inf, np.inf))
        grid, canvas = part.grid, part.canvas
        trachea = grid.tube(0, 2 - 0.02 * (grid.z - 80), 8.5)
        canvas.paint((trachea < 1.5) & (grid.z > 82), 40.0)
        canvas.paint((trachea < 1) & (grid.z > 80), GAS_HU)
        for side in (-1, 1):  # main bronchi
            bronchus = grid.tube(side * np.clip(1.1 * (88 - grid.z), 0, 60), 6.0, 6.5)
            canvas.paint((bronchus < 1) & (grid.z > 48) & (grid.z < 88), GAS_HU)

    def _heart(self) -> None:
        patient, scale = self.patient, self.patient.heart_scale
        shift_x, shift_y, _ = patient.organ_shift_mm
        centre, radii = (20 + shift_x, -20 + shift_y, 30), (60 * scale, 44 * scale, 52 * scale)
        part = self._near(centre, (REACH * max(radii),) * 3)
        above = (part.grid.z > part.dome + DIAPHRAGM_MM) & (part.cavity < 0.98)
        heart = part.grid.ellipsoid(centre, radii, (20, 28, 32)) + part.wobble
        part.canvas.paint((heart < 1.14) & above, FAT_HU + 5)
        muscle_hu = 45 + 0.35 * max(patient.blood_hu - 45, 0)
        part.canvas.paint((heart < 1) & above, muscle_hu + 7 * part.texture, LABELS["heart"])
        left, right = (
            part.grid.ellipsoid((x + shift_x, y + shift_y, z), [radius * scale for radius in radii], turn_deg) + part.wobble
            for (x, y, z), radii, turn_deg in (
                ((36, -14, 26), (30, 20, 27), (20, 28, 32)),
                ((-6, -30, 34), (22, 22, 36), (0, 10, 20)),
            )
        )
        chambers = ((left < 1) | (right < 1)) & (heart < 0.95) & above
        part.canvas.paint(chambers, patient.blood_hu + 5 * part.texture, LABELS["heart"])

    def _stomach(self) -> None:
        half = self.patient.half_width_mm
        centre, radii = (0.32 * half, -0.28 * self.patient.half_depth_mm, -62), (38, 32, 52)
        part = self._near(centre, (REACH * max(radii),) * 3)
        stomach = part.grid.ellipsoid(centre, radii, (0, -18, 15)) + part.wobble
        part.canvas.paint((stomach < 1) & part.below, 48.0)
        part.canvas.paint((stomach < 0.82) & part.below, 22 + 25 * part.texture)
        gas = part.grid.y < -0.28 * self.patient.half_depth_mm - self.rng.uniform(2, 14)
        part.canvas.paint((stomach < 0.82) & part.below & gas, GAS_HU)

    def _liver(self) -> None:
        patient, grid = self.patient, self.grid
        half, (_, shift_y, shift_z), scale = patient.half_width_mm, patient.organ_shift_mm, patient.liver_scale
        right = grid.ellipsoid((-0.46 * half, shift_y, -62 + shift_z), (0.5 * half * scale, 82 * scale, 88 * scale), (0, 14, 0))
        left = grid.ellipsoid(
            (-0.02 * half, -0.38 * patient.half_depth_mm, -48 + shift_z),
            (0.46 * half * scale, 36 * scale, 40 * scale),
            (0, 12, 8),
        )
        inside = (np.minimum(right, left) + self.wobble < 1) & self.below
        self.canvas.paint(inside, patient.liver_hu + 6 * self.texture, LABELS["liver"])
        vessel_hu = 40.0 if patient.blood_hu < 80 else patient.liver_hu + 0.3 * (patient.blood_hu - patient.liver_hu) + 25
        porta = np.sqrt(((grid.x + 0.3 * half) / 90) ** 2 + (grid.y / 80) ** 2 + ((grid.z + 50) / 80) ** 2)
        vessels = inside & (self.vessel_distance < 0.045 * np.clip(1.2 - porta, 0.0, 1.1))
        self.canvas.paint(vessels, vessel_hu, LABELS["liver"])
        centre, radii = (-0.28 * half, -0.42 * patient.half_depth_mm, -108 + shift_z), (13, 15, 26)
        part = self._near(centre, (REACH * max(radii),) * 3)
        part.canvas.paint((part.grid.ellipsoid(centre, radii, (25, 0, 0)) < 1) & part.below, 8.0)

    def _spleen(self) -> None:
        patient = self.patient
        scale, (_, shift_y, shift_z) = patient.spleen_scale, patient.organ_shift_mm
        centre = (0.60 * patient.half_width_mm, 0.30 * patient.half_depth_mm + shift_y, -62 + 0.5 * shift_z)
        radii = (34 * scale, 50 * scale, 54 * scale)
        part = self._near(centre, (REACH * max(radii),) * 3)
        outer = part.grid.ellipsoid(centre, radii, (18, -8, 24))
        hollow = part.grid.ellipsoid((centre[0] - 38, centre[1] - 26, centre[2]), (28, 32, 50))
        inside = (outer + part.wobble < 1) & (hollow > 1) & part.below
        part.canvas.paint(inside, patient.spleen_hu + 5 * part.texture, LABELS["spleen"])

    def _kidneys(self) -> None:
        patient = self.patient
        for side in (-1.0, 1.0):
            scale = patient.kidney_scale * self.rng.uniform(0.94, 1.06)
            centre = (side * (58 + 6 * scale), patient.spine_y_mm - 4, -116 - 10 * (side < 0) + 0.6 * patient.organ_shift_mm[2])
            turn = (-12, side * 10, side * -28)
            radii = (27 * scale, 25 * scale, 53 * scale)
            part = self._near(centre, (REACH * max(radii),) * 3)
            shape = part.grid.ellipsoid(centre, radii, turn) + 0.6 * part.wobble
            part.canvas.paint((shape < 1.5) & part.below, FAT_HU)
            part.canvas.paint((shape < 1) & part.below, patient.kidney_cortex_hu + 5 * part.texture, LABELS["kidneys"])
            part.canvas.paint((shape < 0.56) & part.below, patient.kidney_medulla_hu + 8 * part.texture, LABELS["kidneys"])
            sinus = part.grid.ellipsoid((centre[0] - side * 15, centre[1] - 4, centre[2]), (15, 10, 24), turn) + part.wobble
            part.canvas.paint((sinus < 1) & (shape < 1.1) & part.below, FAT_HU + 35 + 20 * part.texture)

    def _great_vessels(self) -> None:
        patient, part = self.patient, self._near((0, 0, 0), (60, np.inf, np.inf))
        grid, canvas = part.grid, part.canvas
        calm = np.sin(grid.z / 60.0)
        aorta = grid.tube(
            13 + 4 * calm + 0.06 * np.clip(grid.z, -60, 90), patient.spine_y_mm - patient.vertebra_radius_mm - 9, 11.5
        )
        canvas.paint(aorta < 1.25, MUSCLE_HU)
        canvas.paint(aorta < 1, patient.blood_hu)
        cava = grid.tube(
            -20 + 2 * calm, patient.spine_y_mm - patient.vertebra_radius_mm - 14 - 0.12 * np.clip(grid.z + 90, 0, 110), 12.5
        )
        canvas.paint((cava < 1) & (grid.z < 12), 45 + 0.75 * (patient.blood_hu - 45))
        for x, y, radius in (
            (-12.0, -24.0, 14.0),
            (14.0, -26.0, 13.0),
            (-27.0, -14.0, 9.0),
        ):  # ascending aorta, pulmonary trunk, cava
            canvas.paint((grid.tube(x, y, radius) < 1) & (grid.z > 66), patient.blood_hu)
        psoas_size = np.clip((-70 - grid.z) / 70, 0.01, 1)
        for side in (-1, 1):
            psoas = grid.tube(side * (patient.vertebra_radius_mm + 14), patient.spine_y_mm + 4, 17 * psoas_size)
            canvas.paint((psoas < 1) & (grid.z < -75), MUSCLE_HU + 6 * part.texture)

    def _ribs(self) -> None:
        patient, grid = self.patient, self.grid
        turn = np.abs(np.arctan2(grid.x, -grid.y)) / np.float32(np.pi)  # 0 in front, 1 at the spine; [1, Y, X]
        start = (patient.vertebra_pitch_mm * 0.3) % RIB_PITCH_MM
        height = (grid.z - start + RIB_SLOPE_MM * (1 - turn) + RIB_PITCH_MM / 2) % RIB_PITCH_MM - RIB_PITCH_MM / 2
        out = (self.cavity - 1.05) * (patient.half_depth_mm - patient.fat_mm - patient.muscle_mm)
        section = (height / 7.0) ** 2 + (out / 4.5) ** 2
        lowest = -112 + 125 * np.clip((0.62 - turn) / 0.5, 0, 1)  # the costal arch rises to the front
        rib = (section < 1) & (grid.z > lowest) & (turn > 0.1)
        cartilage = turn < 0.3 + 0.03 * np.sin(grid.z / 20)
        self.canvas.paint(rib & cartilage, CARTILAGE_HU)
        self.canvas.paint(rib & ~cartilage, 2.6 * patient.bone_hu, LABELS["bone"])
        self.canvas.paint((section < 0.35) & rib & ~cartilage, patient.bone_hu, LABELS["bone"])

    def _sternum(self) -> None:
        patient = self.patient
        front = -(patient.half_depth_mm - patient.fat_mm - patient.muscle_mm) - 5
        part = self._near((0, front, 0), (18, 8, np.inf))
        grid = part.grid
        shape = np.square(np.square(grid.x / 17)) + np.square(np.square((grid.y - front) / 6.5))  # ** 4 is 30 times slower
        part.canvas.paint((shape < 1) & (grid.z > 12), 1.9 * patient.bone_hu, LABELS["bone"])
        part.canvas.paint((shape < 0.4) & (grid.z > 12), 0.9 * patient.bone_hu + 30 * part.texture, LABELS["bone"])

    def _spine(self) -> None:
        patient = self.patient
        radius, y_mm, pitch = patient.vertebra_radius_mm, patient.spine_y_mm, patient.vertebra_pitch_mm
        bone, canal_y = patient.bone_hu, y_mm + 0.78 * radius + 11
        part = self._near((0, canal_y, 0), (63, 50, np.inf))
        grid, canvas = part.grid, part.canvas
        around = grid.ellipsoid((0, canal_y + 8, 0), (62, 27, 2000))
        canvas.paint((around < 1) & (part.skin < 0.93) & (canvas.labels == 0), MUSCLE_HU + 10 * part.texture)
        level = (grid.z + 1000 * pitch) % pitch - pitch / 2  # 0 in the middle of a vertebra
        body = (grid.x / radius) ** 2 + ((grid.y - y_mm) / (0.78 * radius)) ** 2 + np.zeros_like(grid.z)
        is_disc = np.abs(level) > pitch / 2 - 3.5
        canvas.paint((body < 0.95) & is_disc, 85.0)
        canvas.paint((body < 1) & ~is_disc, 2.2 * bone, LABELS["bone"])
        canvas.paint((body < 0.8) & ~is_disc & (np.abs(level) < pitch / 2 - 5), bone + 22 * part.texture, LABELS["bone"])
        arch = grid.tube(0, canal_y, 14.5)
        process = (np.abs(grid.x) < 4.5) & (grid.y > canal_y + 8) & (grid.y < canal_y + 30 + 0.4 * level) & (level < 4)
        wings = (np.abs(grid.y - canal_y - 3) < 5.0) & (np.abs(grid.x) < 36) & (np.abs(level + 3) < 6)
        canvas.paint((((arch < 1) & (level < 7)) | process | wings) & (part.muscle < 0.99), 1.9 * bone, LABELS["bone"])
        canvas.paint(arch < 0.42, 20.0)
        canvas.paint(arch < 0.16, 42.0)

    def _arms(self) -> None:
        patient, grid = self.patient, self.grid
        for side in (-1.0, 1.0):
            centre = side * (patient.half_width_mm + 40 - 0.05 * grid.z)
            arm = grid.tube(centre, 18 + 0.06 * grid.z, 36.0) + self.wobble
            self.canvas.paint((arm < 1) & (self.skin > 1.02), FAT_HU)
            self.canvas.paint((arm < 0.7) & (self.skin > 1.02), MUSCLE_HU + 8 * self.texture)
            elbow = grid.z > -60
            bones = np.where(
                elbow,
                grid.tube(centre, 18 + 0.06 * grid.z, 11.0),
                np.minimum(grid.tube(centre - 11, 20 + 0.06 * grid.z, 7.5), grid.tube(centre + 11, 14 + 0.06 * grid.z, 7.0)),
            )
            self.canvas.paint(bones < 1, 3.6 * patient.bone_hu, LABELS["bone"])
            self.canvas.paint(bones < 0.35, 0.3 * patient.bone_hu, LABELS["bone"])

    def _table(self) -> None:
        patient, (z, y, x) = self.patient, self.scanner.axes
        top = patient.half_depth_mm * 0.94 + 7 - (x / 210.0) ** 2 * 28  # a shallow trough
        depth = y - top + np.zeros_like(z)
        slab = (depth > 0) & (depth < 32) & (np.abs(x) < 205)
        self.canvas.paint(slab, -880.0)
        self.canvas.paint(slab & ((depth < 3.5) | (depth > 28.5)), -420.0)
        mattress = (depth > -7) & (depth <= 0) & (np.abs(x) < 200)
        self.canvas.paint(mattress, -930.0)
