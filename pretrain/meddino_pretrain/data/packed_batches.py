"""How workers hand batches over: through shared memory, or by value where there is no room for them."""

import pickle
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

from torch.utils.data import get_worker_info

from meddino.core.logging import get_logger
from meddino_pretrain.data.batches import RawBatch

logger = get_logger(__name__)


@dataclass(frozen=True)
class PackedBatch:
    """A batch as bytes: of where it lies in shared memory, or of all that it holds.

    torch would share it in a thread of the worker's queue, where a full /dev/shm or too few file descriptors lose the batch and
    the trainer waits for ever. Packed here, in the worker itself, the fault is seen and the batch goes by value.
    """

    content: bytes

    def unpack(self) -> RawBatch:
        """Return the batch."""
        batch: RawBatch = pickle.loads(self.content)  # noqa: S301 - of our own worker
        return batch

    def pin_memory(self) -> RawBatch:
        """Return the batch in page-locked memory; DataLoader calls this where there is an accelerator."""
        return self.unpack().pin_memory()


def packed(batch: RawBatch) -> PackedBatch:
    """Pack a batch in a worker."""
    try:
        return PackedBatch(bytes(ForkingPickler.dumps(batch)))
    except (RuntimeError, OSError) as error:
        _tell_once(error)
        return PackedBatch(pickle.dumps(batch))


_told: list[int] = []


def _tell_once(error: Exception) -> None:
    worker = get_worker_info()
    if _told or (worker is not None and worker.id):
        return
    _told.append(1)
    logger.warning(
        "batches go through pipes, which is slower: shared memory cannot take them (%s); give the container more (docker run "
        "--shm-size=8g), more open files (ulimit -n 65536), or set loader.workers or loader.prefetch lower",
        str(error).splitlines()[0][:200],
    )
