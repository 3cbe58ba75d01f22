"""What a frozen encoder makes of a crop, computed once: kept in memory, and on disk for other runs where a folder is given."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from meddino.core.device import Machine
from meddino.core.files import atomic_write
from meddino.core.logging import get_logger

logger = get_logger(__name__)


@runtime_checkable
class Encoder(Protocol):
    """What maps come from."""

    def maps(self, images: Tensor, /) -> list[Tensor]:
        """Return the maps of model input."""


class CropKey(NamedTuple):
    """Which crop: case, slice, and the corner in the padded slice."""

    case: str
    z: int
    y: int
    x: int


class MapCache:
    """Maps of crops a frozen encoder has seen. A crop that comes again costs nothing.

    Args:
        network: Its encoder must be frozen.
        machine: Where it runs.
        limit_mib: Memory for maps; beyond it they are read from the folder, or computed again.
        folder: Where maps of a case are kept for other runs, by the model, the settings and the case's files. None: nowhere.

    Attributes:
        computed: How many crops were encoded, and not taken from memory or disk.
    """

    def __init__(
        self,
        network: Encoder,
        machine: Machine,
        limit_mib: float,
        folder: Callable[[str], Path] | None = None,
    ) -> None:
        self.network, self.machine = network, machine
        self.limit_mib, self.folder = limit_mib, folder
        self.computed = 0
        self._maps: dict[CropKey, list[Tensor]] = {}
        self._held_mib = 0.0

    def maps(self, inputs: Tensor, keys: Sequence[CropKey]) -> list[Tensor]:
        """Return the maps of model inputs [B, ...], computed only for keys that are new.

        Every crop is encoded by itself: in a larger batch rounding could differ, and then the result of a run would hang
        on what was computed before it.
        """
        crops = [self._one(inputs[number : number + 1], key) for number, key in enumerate(keys)]
        return [torch.stack(level) for level in zip(*crops, strict=True)]

    def _one(self, image: Tensor, key: CropKey) -> list[Tensor]:
        if key in self._maps:
            return self._maps[key]
        maps = self._read(key)
        if maps is None:
            with torch.no_grad(), self.machine.autocast():
                maps = [one[0].float() for one in self.network.maps(image)]
            self.computed += 1
            self._write(key, maps)
        size_mib = sum(one.numel() * one.element_size() for one in maps) / 2**20
        if self._held_mib + size_mib <= self.limit_mib:
            self._maps[key] = maps
            self._held_mib += size_mib
        return maps

    def _path(self, key: CropKey) -> Path | None:
        return None if self.folder is None else self.folder(key.case) / f"{key.z}_{key.y}_{key.x}.safetensors"

    def _read(self, key: CropKey) -> list[Tensor] | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            tensors = load_file(path)
            return [tensors[str(number)].to(self.machine.device) for number in range(len(tensors))]
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning("%s is damaged and is computed anew: %s", path, error)
            return None

    def _write(self, key: CropKey, maps: Sequence[Tensor]) -> None:
        path = self._path(key)
        if path is not None:
            with atomic_write(path) as stream:
                stream.write(save({str(number): one.cpu().contiguous() for number, one in enumerate(maps)}))
