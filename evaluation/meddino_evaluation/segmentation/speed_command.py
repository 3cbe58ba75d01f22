"""`meddino-eval speed`: our sliding window and our metrics against MONAI's: time in turns, memory in processes of their own."""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SPACING_MM = (3.0, 0.8, 0.8)
Work = Callable[[], list[float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval speed`."""
    parser.add_argument("what", choices=["inference", "metrics"], help="sliding window, or Dice and surfaces of one mask")
    parser.add_argument("--slices", type=int, default=8, help="inference: slices of the volume")
    parser.add_argument("--size-px", type=int, default=384, help="inference: side of a slice")
    parser.add_argument("--window-px", type=int, default=192, help="inference: side of the window")
    parser.add_argument("--shape", type=int, nargs=3, default=[200, 512, 512], help="metrics: voxels of the mask, z y x")
    parser.add_argument("--repeats", type=int, default=3, help="turns; the ratios are medians over them")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval speed`: one JSON line."""
    from meddino.core.device import use_cpu_threads

    use_cpu_threads()
    options = vars(arguments)
    names = (f"{arguments.what}_ours", f"{arguments.what}_monai")
    ours, theirs = _in_turns([_prepare(name, options) for name in names], arguments.repeats)
    # A process each: the peak of resident memory never goes down again within one.
    ours_mib, monai_mib = (_peak_in_own_process(name, options) for name in names)
    line = {
        "what": arguments.what,
        "ours_s": round(min(ours.seconds), 4),
        "monai_s": round(min(theirs.seconds), 4),
        "time_ratio": _ratio(ours.seconds, theirs.seconds),
        # Where other processes compute, the processor's time says more than the clock's.
        "ours_cpu_s": round(min(ours.cpu_s), 4),
        "monai_cpu_s": round(min(theirs.cpu_s), 4),
        "cpu_ratio": _ratio(ours.cpu_s, theirs.cpu_s),
        "ours_mib": ours_mib,
        "monai_mib": monai_mib,
        "largest_difference": max(abs(a - b) for a, b in zip(ours.values, theirs.values, strict=True)),
        "threads": torch.get_num_threads(),
    }
    sys.stdout.write(json.dumps(line) + "\n")


@dataclass
class Measured:
    """Times of every turn, and what was found."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def _in_turns(works: Sequence[Work], repeats: int) -> list[Measured]:
    measured = [Measured() for _ in works]
    for turn in range(repeats):
        pairs = list(zip(measured, works, strict=True))
        for one, work in pairs if turn % 2 == 0 else reversed(pairs):
            start, cpu_start = time.perf_counter(), time.process_time()
            one.values = work()
            one.seconds.append(time.perf_counter() - start)
            one.cpu_s.append(time.process_time() - cpu_start)
    return measured


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios within a turn: what else the machine does weighs on both alike."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def _peak_in_own_process(name: str, options: dict[str, Any]) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(name, {k: v for k, v in options.items() if k != "handle"}, sender))
    process.start()
    sender.close()
    try:
        found: float = receiver.recv()
    finally:
        process.join()
    return found


def _peak(name: str, options: dict[str, Any], sender: Any) -> None:
    from meddino.core.device import use_cpu_threads

    use_cpu_threads()
    work = _prepare(name, options)
    # What was read by importing must not hide what the work takes: Linux forgets the peak so far.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_mib("VmRSS")
    work()
    sender.send(round(_status_mib("VmHWM") - before, 1))


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def _prepare(name: str, options: dict[str, Any]) -> Work:
    if name.startswith("inference"):
        network, images = _network(), _images(options)
        return _inference(name, network, images, options["window_px"])
    return _metrics(name, *_masks(options["shape"]))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 8, stride=8), nn.GELU(), nn.ConvTranspose2d(16, 8, 8, stride=8)).eval()


def _images(options: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(options["slices"], 1, options["size_px"], options["size_px"], generator=generator)


def _inference(name: str, network: nn.Module, images: Tensor, window: int) -> Work:
    if name.endswith("ours"):
        from meddino_evaluation.segmentation.inference.sliding_window import SlidingWindow

        own = SlidingWindow(window, batch_size=8)

        def predict() -> Tensor:
            return own(images, network, 0.0)
    else:
        from monai.inferers import SlidingWindowInferer

        inferer = SlidingWindowInferer((window, window), sw_batch_size=8, overlap=0.5, mode="gaussian")

        def predict() -> Tensor:
            with torch.no_grad():
                found: Tensor = inferer(images, network)
            return found

    def work() -> list[float]:
        found: list[float] = predict().flatten()[::997].tolist()
        return found

    return work


def _masks(shape: list[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in shape), indexing="ij", sparse=True)
    ripple = 0.04 * np.sin(9 * x) * np.cos(11 * y)
    return (z**2 + y**2 + x**2 + ripple) < 0.45, (z**2 + (y - 0.03) ** 2 + (x + 0.02) ** 2) < 0.46


def _metrics(name: str, pred: Any, ref: Any) -> Work:
    if name.endswith("ours"):
        from meddino_evaluation.metrics.label_metrics import mask_metrics

        def measure() -> list[float]:
            found = mask_metrics(pred, ref, SPACING_MM, 1.0)
            return [found[key] for key in ("dice", "hd95_mm", "assd_mm", "nsd")]
    else:
        from monai.metrics import (
            compute_average_surface_distance,
            compute_dice,
            compute_hausdorff_distance,
            compute_surface_dice,
        )

        def measure() -> list[float]:
            first, second = (torch.from_numpy(mask)[None, None] for mask in (pred, ref))
            options: dict[str, Any] = {"include_background": True, "spacing": SPACING_MM}
            return [
                float(compute_dice(first, second)),
                float(compute_hausdorff_distance(first, second, percentile=95, **options)),
                float(compute_average_surface_distance(first, second, symmetric=True, **options)),
                float(compute_surface_dice(first, second, [1.0], use_subvoxels=True, **options)),
            ]

    return measure
