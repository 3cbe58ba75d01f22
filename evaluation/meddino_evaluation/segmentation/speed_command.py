"""`meddino-eval speed`: our sliding window and our metrics against MONAI's, each in a process of its own."""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SPACING_MM = (3.0, 0.8, 0.8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval speed`."""
    parser.add_argument("what", choices=["inference", "metrics"], help="sliding window, or Dice and surfaces of one mask")
    parser.add_argument("--slices", type=int, default=8, help="inference: slices of the volume")
    parser.add_argument("--size-px", type=int, default=384, help="inference: side of a slice")
    parser.add_argument("--window-px", type=int, default=192, help="inference: side of the window")
    parser.add_argument("--shape", type=int, nargs=3, default=[200, 512, 512], help="metrics: voxels of the mask, z y x")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval speed`: one JSON line."""
    jobs = _INFERENCE if arguments.what == "inference" else _METRICS
    # A process each: the peak of resident memory never goes down again within one.
    measured = {name: _in_own_process(name, vars(arguments)) for name in jobs}
    ours, theirs = measured[jobs[0]], measured[jobs[1]]
    line = {
        "what": arguments.what,
        "ours_s": ours["seconds"],
        "monai_s": theirs["seconds"],
        "time_ratio": round(ours["seconds"] / theirs["seconds"], 3),
        # Where other processes compute, the processor's time says more than the clock's.
        "ours_cpu_s": ours["cpu_s"],
        "monai_cpu_s": theirs["cpu_s"],
        "ours_mib": ours["mib"],
        "monai_mib": theirs["mib"],
        "largest_difference": max(abs(a - b) for a, b in zip(ours["values"], theirs["values"], strict=True)),
        "threads": torch.get_num_threads(),
    }
    sys.stdout.write(json.dumps(line) + "\n")


_INFERENCE = ("inference_ours", "inference_monai")
_METRICS = ("metrics_ours", "metrics_monai")


def _in_own_process(name: str, options: dict[str, Any]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(name, {k: v for k, v in options.items() if k != "handle"}, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    finally:
        process.join()
    return found


def _measure(name: str, options: dict[str, Any], sender: Any) -> None:
    from meddino.core.device import find_machine, use_cpu_threads

    use_cpu_threads()
    work = _prepare(name, options)
    machine = find_machine("cpu")
    before = machine.peak_memory_mib()
    seconds, cpu, values = float("inf"), float("inf"), []
    for _ in range(options["repeats"]):
        start, cpu_start = time.perf_counter(), time.process_time()
        values = work()
        seconds, cpu = min(seconds, time.perf_counter() - start), min(cpu, time.process_time() - cpu_start)
    mib = machine.peak_memory_mib() - before
    sender.send({"seconds": round(seconds, 4), "cpu_s": round(cpu, 4), "mib": round(mib, 1), "values": values})


def _prepare(name: str, options: dict[str, Any]) -> Callable[[], list[float]]:
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


def _inference(name: str, network: nn.Module, images: Tensor, window: int) -> Callable[[], list[float]]:
    if name.endswith("ours"):
        from meddino_evaluation.segmentation.sliding_window import SlidingWindow

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


def _metrics(name: str, pred: Any, ref: Any) -> Callable[[], list[float]]:
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
