"""Where a command computes and in which arithmetic, as a config says it; `meddino.core.device` finds the machine."""

from typing import Literal

from meddino.core.config import StrictConfig

Precision = Literal["auto", "fp32", "bf16"]
# fp64: for finding out whether two runs differ by more than rounding.
TrainingPrecision = Literal["auto", "fp32", "bf16", "fp64"]
Parallel = Literal["auto", "none", "ddp", "fsdp2"]
PackedKernel = Literal["sdpa", "xformers"]
Compile = bool | Literal["auto"]
Checkpointing = bool | Literal["selective"]


class MachineConfig(StrictConfig):
    """Where it runs. Nothing here changes what is learnt, beyond rounding."""

    device: str = "auto"
    """auto: an accelerator if there is one, else the CPU; or cpu, cuda, cuda:1."""
    precision: TrainingPrecision = "auto"
    """auto: bf16 on an accelerator that has it, fp32 on the CPU; or fp32, bf16, fp64 (to compare runs)."""
    parallel: Parallel = "auto"
    """auto: DDP where there are several processes; fsdp2 cuts weights over them."""
    activation_checkpointing: Checkpointing = False
    """Recompute blocks in the backward pass: a third slower, far less memory; selective: all but products and attention."""
    compile: Compile = "auto"
    """torch.compile for blocks, heads and losses: faster after a minute of compiling; auto: on a CUDA device."""
    packed_attention: PackedKernel = "sdpa"
    """What attends within crops of several sizes: torch's own attention, or xformers' on an NVIDIA GPU; measure before."""
