"""What a file may ask of the machine."""

import math
from collections.abc import Sequence

from pydantic import Field

from meddino.core.config import StrictConfig
from meddino.core.errors import VolumeError


class ReadLimits(StrictConfig):
    """Sizes beyond which a volume is refused before memory is taken for it. All ours."""

    max_volume_voxels: int = Field(1_500_000_000, ge=1)
    """[voxels] larger volumes are refused before memory is taken."""
    max_axis_px: int = Field(16384, ge=1)
    """[px] a longer axis is refused before memory is taken."""
    missing_spacing_mm: float | None = Field(None, gt=0)
    """[mm] voxel size taken, with a note, where a file names none; null refuses such files."""

    def check(self, size: Sequence[int]) -> int:
        """Refuse a size that is no volume's, or more than may be read, before memory is taken.

        Args:
            size: Voxels along each axis; those after the third have to be 1.

        Returns:
            How many voxels they are.

        Raises:
            VolumeError: Says which axis or limit it is.
        """
        if len(size) < 2:
            raise VolumeError(f"image has {len(size)} axes; a volume has 3")
        if min(size) < 1:
            raise VolumeError(f"an axis has no voxels: size {list(size)}")
        if math.prod(size[3:]) > 1:
            raise VolumeError(f"image has {math.prod(size[3:])} time points or channels; a volume has 1")
        if max(size) > self.max_axis_px:
            raise VolumeError(f"an axis of {max(size)} voxels; limits.max_axis_px is {self.max_axis_px}")
        voxels = math.prod(size)
        if voxels > self.max_volume_voxels:
            raise VolumeError(f"{voxels} voxels; limits.max_volume_voxels is {self.max_volume_voxels}")
        return voxels
