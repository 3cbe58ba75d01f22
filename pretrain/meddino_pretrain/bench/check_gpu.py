"""`meddino-pretrain check-gpu`: what to run first on a new GPU: minutes, a verdict a line, before days are spent there."""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from meddino.checkpoints.state.flat_state import OptimizerState
from meddino.checkpoints.state.training_state import State, load_training_state, save_training_state
from meddino.core.command import write_line
from meddino.core.device import Machine, find_machine
from meddino.core.errors import MedDINOError
from meddino.core.logging import get_logger
from meddino.core.machine_config import MachineConfig, Parallel
from meddino.distributed.collectives import is_main, rank
from meddino.distributed.launcher import launch
from meddino.distributed.process_group import start_distributed
from meddino_pretrain.bench import checked_config
from meddino_pretrain.bench.step import MeasuredStep, StepSize, bench_step

logger = get_logger(__name__)

# ViT-B, 64 slices at the paper's size (docs/scaling.md); an allocator adds some per cent.
TRACED_GB = 23.7
WITHIN = {"fp32": 1e-3, "bf16": 2e-2}
RAISED = "rank 1 raises on purpose"


@dataclass(frozen=True)
class Verdict:
    """One line.

    Attributes:
        kind: How it came out.
        what: Was looked at.
        said: The figures, or why nothing was looked at.
    """

    kind: Literal["ok", "wrong", "left out"]
    what: str
    said: str


def run(arguments: argparse.Namespace) -> None:
    """Print the verdicts; see `bench.commands.check_gpu`.

    Raises:
        MedDINOError: One of them is "wrong".
    """
    found = Counter[str]()
    for verdict in verdicts(find_machine(arguments.device)):
        write_line(f"{verdict.kind:9} {verdict.what}: {verdict.said}")
        found[verdict.kind] += 1
    if found["wrong"]:
        raise MedDINOError(
            f"check-gpu: {found['wrong']} of the lines above say 'wrong'; do not train on this machine before they do not"
        )
    write_line(f"nothing is wrong: {found['ok']} ok, {found['left out']} left out")


def verdicts(machine: Machine) -> Iterator[Verdict]:
    """Yield one verdict after the other, the quick ones first.

    Args:
        machine: What is looked at; on a CPU what needs a GPU is left out.
    """
    on_gpu, device = machine.device.type == "cuda", str(machine.device)
    yield Verdict("ok" if on_gpu else "left out", "device", machine.identity or "no GPU here: the CPU does what it can")
    exact = losses_of(find_machine("cpu", "fp32"))
    for precision, within in WITHIN.items():
        found = losses_of(find_machine(device, "fp32" if precision == "fp32" else "bf16"))
        yield _compared(f"{precision} against the CPU's float32", found, exact, within)
    yield _attention(machine) if on_gpu else Verdict("left out", "flash attention", "needs a GPU")
    if on_gpu:
        found = losses_of(machine, MachineConfig(compile=True))
        yield _compared("compiled", found, exact, WITHIN["bf16"])
    else:
        yield Verdict("left out", "compiled", "off on a CPU unless machine.compile=true")
    yield from _several_processes(exact, torch.cuda.device_count() if on_gpu else 2)
    yield _resumed(find_machine(device, "fp32"), 1e-5 if on_gpu else 0.0)
    if on_gpu:
        yield from _speed(machine)
    else:
        yield Verdict("left out", "speed and peak memory of ViT-B, 64 slices", "need a GPU")


def losses_of(machine: Machine, config: MachineConfig | None = None) -> list[float]:
    """Return the losses of two tiny steps; the same images and weights everywhere."""
    step = MeasuredStep(StepSize("vitnano8", 4, checked_config("tiny")), machine, config or MachineConfig(compile=False))
    fill_layerscale(step)
    losses = []
    for _ in range(2):
        step.run()
        losses.append(step.loss)
    return losses


@torch.no_grad()
def fill_layerscale(step: MeasuredStep) -> None:
    """Set LayerScale to 1 everywhere: at a fresh one images hardly reach the losses, and KoLeo's is a matter of rounding."""
    for network in step.method.networks().values():
        for name, value in network.named_parameters():
            if name.endswith("gamma"):
                value.fill_(1.0)


def work(mode: str, result: Path) -> None:
    """Do one process's part of a check of several.

    Args:
        mode: How processes work together; or "raise": the second one fails.
        result: Where the first one writes the losses.
    """
    with start_distributed() as place:
        if mode == "raise":
            if rank() == 1:
                raise RuntimeError(RAISED)
            torch.distributed.barrier()
        parallel: Parallel = "fsdp2" if mode == "fsdp2" else "ddp"
        machine = find_machine("auto", "auto", place.local_rank)
        losses = losses_of(machine, MachineConfig(parallel=parallel, compile=False))
        if is_main():
            result.write_text(json.dumps(losses))


def _compared(what: str, found: Sequence[float], exact: Sequence[float], within: float) -> Verdict:
    away = max(abs(one / other - 1) for one, other in zip(found, exact, strict=True))
    return Verdict("ok" if away <= within else "wrong", what, f"losses differ by {away:.1e} (allowed {within:.0e})")


def _attention(machine: Machine) -> Verdict:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(2, 4, 64, 64, device=machine.device, dtype=machine.compute_dtype)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
    except RuntimeError as error:
        return Verdict("wrong", "flash attention", f"not for {machine.compute_dtype}: {str(error).splitlines()[0]}")
    return Verdict("ok", "flash attention", f"runs in {machine.compute_dtype}")


def _several_processes(exact: Sequence[float], available: int) -> Iterator[Verdict]:
    if available < 2:
        yield Verdict("left out", "DDP, FSDP2, a process that raises", "need two GPUs")
        return
    with tempfile.TemporaryDirectory(prefix="meddino-check-") as folder:
        for mode in ("ddp", "fsdp2", "raise"):
            if mode == "raise":
                logger.info("now one of two processes raises on purpose: the tracebacks that follow are asked for")
            result, start = Path(folder) / mode, time.perf_counter()
            code = launch([sys.executable, "-m", "meddino_pretrain.bench.check_gpu", mode, str(result)], 2)
            seconds = time.perf_counter() - start
            if mode == "raise":
                ended = code == 1 and seconds < 90
                yield Verdict(
                    "ok" if ended else "wrong",
                    "a process that raises",
                    f"exit code {code} after {seconds:.0f} s, start included; the tracebacks above are its own",
                )
            elif code or not result.is_file():
                yield Verdict("wrong", f"2 processes, {mode}", f"exit code {code}; what they said is above")
            else:
                yield _compared(f"2 processes, {mode}", json.loads(result.read_text()), exact, WITHIN["bf16"])


def _resumed(machine: Machine, within: float) -> Verdict:
    size = StepSize("vitnano8", 4, checked_config("tiny"))
    first, second = (MeasuredStep(size, machine, MachineConfig(compile=False)) for _ in range(2))
    states: list[State] = [
        {**each.method.networks(), "optimizer": OptimizerState("optimizer", each.optimizer, each.method.model)}
        for each in (first, second)
    ]
    first.run()
    with tempfile.TemporaryDirectory(prefix="meddino-check-") as folder:
        saved = save_training_state(Path(folder) / "step-000000001", states[0], {"step": 1})
        load_training_state(saved, states[1])
    second.step = first.step
    first.run()
    second.run()
    return _compared("saved and resumed", [second.loss], [first.loss], within)


def _speed(machine: Machine) -> Iterator[Verdict]:
    logger.info("now ViT-B at its full size, compiled: some minutes")
    figures = bench_step(StepSize("vitb16", 64, checked_config("paper"), {"drop_path": 0.2}), 10, machine)
    share, peak = figures["share_of_peak"], figures["peak_mib"] * 2**20 / 1e9
    said = f"{figures['images_per_s']:.0f} slices/s, {figures['tflops']:.0f} TFLOP/s, {share:.0%} of torch.mm's"
    yield Verdict(
        "ok" if share > 0.3 else "wrong",
        "speed of ViT-B, 64 slices",
        f"{said} (docs/scaling.md counts on 33 % of what an H100's data sheet says, 40 % of an A100's)",
    )
    fits = peak < 1.15 * TRACED_GB
    yield Verdict("ok" if fits else "wrong", "peak memory of it", f"{peak:.1f} GB; traced {TRACED_GB} GB")


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
