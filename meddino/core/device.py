"""What the machine can do and in which arithmetic, asked in one place. No other module names a kind of device."""

import contextlib
import os
import socket
from dataclasses import dataclass

import torch
from torch import Tensor

from meddino.core.command import usable_cores
from meddino.core.errors import ConfigError
from meddino.core.machine_config import TrainingPrecision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Machine:
    """The device this process computes on and the arithmetic it uses there.

    Attributes:
        device: Where tensors live.
        compute_dtype: Data type of matrix products; weights, losses and the optimizer are `weight_dtype`.
    """

    device: torch.device
    compute_dtype: torch.dtype

    @property
    def is_accelerator(self) -> bool:
        """True where work is queued on a device and runs beside the host."""
        return self.device.type != "cpu"

    @property
    def weight_dtype(self) -> torch.dtype:
        """Data type of weights, images, losses and the optimizer: float32, or float64 where everything is computed in it."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def identity(self) -> str:
        """Which GPU of which machine this is, the same for every process that sees it; empty where processes may share."""
        if self.device.type != "cuda":
            return ""
        return f"{socket.gethostname()} {torch.cuda.get_device_properties(self.device).uuid}"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        if self.compute_dtype == self.weight_dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def synchronize(self) -> None:
        """Wait for queued work; only for measuring."""
        if self.is_accelerator:
            torch.accelerator.synchronize(self.device)

    def peak_memory_mib(self) -> float:
        """Return the peak of the memory taken so far: the device's allocator, or the process's resident size on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def find_machine(device: str = "auto", precision: TrainingPrecision = "auto", local_rank: int = 0) -> Machine:
    """Choose the device and the arithmetic.

    Args:
        device: "auto" takes the accelerator where there is one, else the CPU; or "cpu", "cuda", "cuda:1", ...
        precision: "auto" is bf16 on an accelerator that has it and fp32 on the CPU, where bf16 is 20 times slower;
            fp64 is for comparing runs.
        local_rank: Which of the machine's accelerators this process takes.

    Raises:
        ConfigError: The device asked for is not there.
    """
    # Read when the first tensor is made on a GPU: crops of several sizes would leave holes that the next sizes do not fit into.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    available = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        chosen = (
            torch.device(available.type, local_rank % torch.accelerator.device_count()) if available else torch.device("cpu")
        )
    else:
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"device '{device}' is unknown; allowed: auto, cpu, cuda, cuda:<number>") from error
        if chosen.type != "cpu" and (available is None or chosen.type != available.type):
            raise ConfigError(
                f"device '{device}' is not available on this machine (found: {available or 'cpu only'}); use device=auto"
            )
        if chosen.type != "cpu" and chosen.index is None:
            chosen = torch.device(chosen.type, local_rank % torch.accelerator.device_count())
    if chosen.type != "cpu":
        torch.accelerator.set_device_index(chosen.index or 0)
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if chosen.type == "cuda":
        # Where products are asked for in bf16, the few in float32 (Gram's similarities) may be rounded to TF32; else not.
        torch.set_float32_matmul_precision("high" if precision == "bf16" else "highest")
    return Machine(chosen, DTYPES[precision])


def use_cpu_threads(count: int | None = None) -> None:
    """Set how many threads torch computes with.

    Args:
        count: None respects OMP_NUM_THREADS and otherwise takes the cores this process may run on. Two torch processes
            with full thread pools on the same cores slow each other 4 to 18 times, so launchers set OMP_NUM_THREADS.

    Raises:
        ConfigError: Fewer than one.
    """
    if count is not None and count < 1:
        raise ConfigError(f"{count} threads; at least 1 is needed")
    if count is None:
        count = int(os.environ.get("OMP_NUM_THREADS", "0")) or usable_cores()
    torch.set_num_threads(count)


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """Return what a loss of this tensor is computed in: float32, or float64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it is float64 already: what a loss computes in."""
    return tensor.to(loss_dtype(tensor))
