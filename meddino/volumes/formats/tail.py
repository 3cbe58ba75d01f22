"""What a file holds behind the last voxel that its header promises: padding, or voxels that would be lost and sheared."""

from meddino.core.errors import VolumeError

MAX_TAIL_BYTES = 1 << 16
"""Behind the last voxel; some writers pad."""


def most_tail_bytes(voxel_bytes: int, longest_axis_px: int) -> int:
    """Return how much may follow the voxels: less than one more plane across any axis, which would be an axis told short.

    Args:
        voxel_bytes: Promised, of the whole volume.
        longest_axis_px: Voxels along it; across it lies the smallest plane.
    """
    return min(MAX_TAIL_BYTES, max(voxel_bytes // longest_axis_px - 1, 0))


def check_tail(tail_bytes: int, most_bytes: int) -> None:
    """Refuse a file that goes on too far behind its last voxel.

    Raises:
        VolumeError: It does; the header promises fewer voxels than there are, or others.
    """
    if tail_bytes > most_bytes:
        raise VolumeError("the file goes on behind the last voxel that its header promises")
