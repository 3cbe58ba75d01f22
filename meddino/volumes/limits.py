"""What a file may ask of the machine."""

from pydantic import Field

from meddino.core.config import StrictConfig


class ReadLimits(StrictConfig):
    """Sizes beyond which a volume is refused before memory is taken for it. All ours."""

    max_volume_voxels: int = Field(1_500_000_000, ge=1)
    """[voxels] larger volumes are refused before memory is taken."""
    max_axis_px: int = Field(16384, ge=1)
    """[px] a longer axis is refused before memory is taken."""
