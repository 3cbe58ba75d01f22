"""Saving beside training: the state is copied to the host at once, and written by a thread while the next steps run."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from meddino.checkpoints.state.flat_state import flatten, written_here
from meddino.distributed.collectives import using_group, world_size


class BackgroundSaver:
    """Runs one piece of writing at a time in a thread of its own.

    The processes agree on a checkpoint through a process group of its own, so their messages never meet those of the
    training steps.
    """

    def __init__(self) -> None:
        group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._group = group if isinstance(group, dist.ProcessGroup) else None  # else: a number for "not a member"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write. What began before is waited for first, and its error raised."""
        self.wait()
        self._running = self._thread.submit(self._write, write)

    def wait(self) -> None:
        """Return when everything is on disk; raise what went wrong on the way."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _write(self, write: Callable[[], None]) -> None:
        with using_group(self._group):
            write()


class FrozenState:
    """Copies states to the host, so that training may go on while they are written."""

    def __init__(self) -> None:
        self._meshes: dict[tuple[int, ...], DeviceMesh] = {}

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state's flat names with copies of the tensors that this process writes; sharded ones stay so (DTensor)."""
        tensors, values = flatten(state)
        return {**{name: self._copied(tensor) for name, tensor in written_here(tensors).items()}, **values}

    def _copied(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.detach().to("cpu", copy=True)
        local: Tensor = tensor.to_local()
        return DTensor.from_local(
            local.detach().to("cpu", copy=True),
            self._host_mesh(tensor.device_mesh),
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def _host_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        if mesh.device_type == "cpu":
            return mesh
        shape = tuple(mesh.shape)
        if shape not in self._meshes:
            self._meshes[shape] = init_device_mesh("cpu", shape)
        return self._meshes[shape]
