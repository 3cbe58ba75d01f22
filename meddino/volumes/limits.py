"""What a file may ask of the machine."""

from typing import Annotated

from pydantic import Field

from meddino.core.config import StrictConfig


class ReadLimits(StrictConfig):
    """Sizes beyond which a volume is refused before memory is taken for it. All ours."""

    max_volume_voxels: Annotated[int, Field(ge=1, description="[voxels] larger volumes are refused before memory is taken")] = (
        1_500_000_000
    )
    max_axis_px: Annotated[int, Field(ge=1, description="[px] a longer axis is refused before memory is taken")] = 16384
