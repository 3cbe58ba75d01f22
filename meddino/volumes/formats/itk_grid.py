"""The grid of an NRRD or MetaImage file, and what ITK assumes of it without a word: 1 mm, mm, LPS, right angles."""

import re
from itertools import zip_longest

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.volumes.formats.axes import SAME_SPACING, right_angled
from meddino.volumes.geometry import Geometry, geometry_from_xyz
from meddino.volumes.limits import ReadLimits

_UNIT_MM = {
    "mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "millimetre": 1.0, "millimetres": 1.0, "cm": 10.0, "centimeter": 10.0,
    "m": 1000.0, "meter": 1000.0, "um": 0.001, "µm": 0.001, "μm": 0.001, "micron": 0.001, "microns": 0.001, "micrometer": 0.001,
}  # fmt: skip
_NO_LENGTHS = {"s", "sec", "second", "seconds", "ms", "us", "min", "hz", "khz", "mhz", "rad", "deg", "degree", "degrees", "ppm"}
_ANATOMY = {
    "right-anterior-superior", "ras", "left-anterior-superior", "las", "left-posterior-superior", "lps",
    "left-posterior-superior-time", "lpst",
}  # fmt: skip
# ITK turns x, y, z to LPS, but takes them as they are where time is a fourth axis.
_NOT_TURNED = {
    "right-anterior-superior-time": (-1.0, -1.0, 1.0), "rast": (-1.0, -1.0, 1.0),
    "left-anterior-superior-time": (1.0, -1.0, 1.0), "last": (1.0, -1.0, 1.0),
}  # fmt: skip
_AXES_OF_SPACE = ("domain", "space", "time", "???", "none")  # NRRD's kinds of axes; along others lie the values of one voxel


def read_grid(
    reader: sitk.ImageFileReader, format: str, fields: dict[str, str], limits: ReadLimits
) -> tuple[Geometry, tuple[str, ...], str]:
    """Return the grid, what was assumed, and why it is not quite the voxels' own ("" where it is).

    Args:
        reader: Has read the header.
        format: "nrrd" or "metaimage".
        fields: The header's own words by key in small letters.
        limits: Say which voxel size to take where there is none.

    Raises:
        VolumeError: It names no voxel size, one that is not above 0, units that are none of length, or axes that are not
            three directions. The message holds no words of the header.
    """
    scale, notes = _assumed(format, fields, limits)
    without_size = _axes_without_size(fields) if format == "nrrd" else ()
    taken = [step * scale for step in (*reader.GetSpacing(), 1.0)[:3]]
    spacing = [np.nan if is_missing else step for step, is_missing in zip_longest(taken, without_size, fillvalue=False)]
    if not np.isfinite(spacing).all() or min(spacing) <= 0:
        raise VolumeError(f"voxel spacing {[round(step, 4) for step in reversed(spacing)]} mm; must be above 0")
    turn = np.array(_NOT_TURNED.get(fields.get("space", "").lower(), (1.0, 1.0, 1.0)))
    origin = (turn * (*reader.GetOrigin(), 0.0)[:3] * scale).tolist()
    if not np.isfinite(origin).all():
        raise VolumeError(f"the first voxel lies at {[round(place, 4) for place in origin]} mm; must be finite")
    directions = turn[:, None] * _directions(reader)
    if not np.isfinite(directions).all() or np.linalg.matrix_rank(directions) < 3:
        raise VolumeError(f"axes of the voxels are {np.round(directions.T, 4).tolist()}; must be three directions")
    lengths = np.linalg.norm(directions, axis=0)
    if np.abs(lengths - 1.0).max() > SAME_SPACING:  # less is rounding
        spacing = (spacing * lengths).tolist()  # as ITK has it where a voxel lies
        notes += ("axes are not of length 1: the voxel size is multiplied by their lengths",)
    axes, sheared = right_angled(directions / lengths)
    if sheared:
        notes += (sheared,)
    size = (*reader.GetSize(), 1)[:3]
    return geometry_from_xyz(size, spacing, origin, axes.ravel().tolist()), notes, sheared


def _directions(reader: sitk.ImageFileReader) -> NDArray[np.float64]:
    """Return [3, 3]: ITK's direction of each axis in a column, whatever the number of axes."""
    count = len(reader.GetSize())
    matrix = np.eye(max(count, 3))
    matrix[:count, :count] = np.asarray(reader.GetDirection()).reshape(count, count)
    return matrix[:3, :3]


def _axes_without_size(fields: dict[str, str]) -> tuple[bool, ...]:
    """Return of each of an NRRD file's axes x, y, z whether its step is NaN or "none", for which ITK takes 1."""
    if "space directions" in fields:
        steps = re.findall(r"none|\([^)]*\)", fields["space directions"])
    else:
        steps = fields.get("spacings", "").lower().split()
    axes = zip_longest(steps, fields.get("kinds", "").lower().split(), fillvalue="???")
    return tuple(step == "none" or "nan" in step.lower() for step, kind in axes if kind in _AXES_OF_SPACE)[:3]


def _assumed(format: str, fields: dict[str, str], limits: ReadLimits) -> tuple[float, tuple[str, ...]]:
    """Return the millimetres of the header's unit, and what the file does not say of its grid."""
    is_nrrd = format == "nrrd"
    sized = ("space directions", "spacings") if is_nrrd else ("elementspacing", "elementsize")
    notes: list[str] = []
    scale = 1.0
    if not any(name in fields for name in sized):
        if limits.missing_spacing_mm is None:
            raise VolumeError("voxel size is not in the file; limits.missing_spacing_mm says which to take")
        scale = limits.missing_spacing_mm
        notes.append(f"voxel size is not in the file: taken as {scale:g} mm")
    elif (unit_mm := _unit_mm(_units_written(fields, is_nrrd))) is not None:
        scale = unit_mm
    elif is_nrrd:
        notes.append("units are not in the file: taken as mm")
    oriented = ("space", "space directions") if is_nrrd else ("transformmatrix", "orientation", "rotation")
    if not (all if is_nrrd else any)(name in fields for name in oriented):
        notes.append("orientation is not in the file: axes taken to run to left, back and up")
        letters = fields.get("anatomicalorientation", "").upper()  # from where axes run; ITK reads the matrix alone
        if not is_nrrd and re.fullmatch("[RLAPIS]{3}", letters) and letters != "RAI":
            notes.append(f"AnatomicalOrientation {letters}, which says otherwise, is not followed")
    elif is_nrrd and fields["space"].lower() not in {*_ANATOMY, *_NOT_TURNED}:
        notes.append("orientation is not in the file: x, y and z of its space taken to run to left, back and up")
    return scale, tuple(notes)


def _units_written(fields: dict[str, str], is_nrrd: bool) -> str:
    if not is_nrrd:
        return fields.get("distanceunits", "")
    return fields.get("space units", "") or fields.get("units", "")  # of a space; of axes that have spacings


def _unit_mm(written: str) -> float | None:
    """Return the millimetres of the unit that a header names for x, y and z, or None where it names none."""
    words = [word.strip().lower() for word in re.findall(r'"([^"]*)"', written) or written.split()][:3]  # a fourth is time's
    units = set(words) - {"", "?", "???"}
    if not units <= set(_UNIT_MM) or len({_UNIT_MM[unit] for unit in units}) > 1:
        known = units & {*_UNIT_MM, *_NO_LENGTHS}  # another word may be a patient's name
        told = ", ".join([*sorted(known), *(["none of length"] if units - known else [])])
        raise VolumeError(f"units of the voxel size are {told}; known are mm, cm, m, um, one for all axes")
    return _UNIT_MM[min(units)] if units else None
