"""Dice, HD95, ASSD and NSD of one mask, ours against MONAI's: time in turns, largest difference of the values.

    python -m tests.benchmarks.bench_segmentation_metrics [--shape 200 512 512] [--repeats 3]

One JSON line. Ratios are medians within turns; processor time says more than the clock where other processes compute.
"""

import argparse
import json
import statistics
import sys
import time

import numpy as np
import torch
from meddino_evaluation.metrics.label_metrics import mask_metrics

SPACING_MM = (3.0, 0.8, 0.8)


def masks(shape):
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in shape), indexing="ij", sparse=True)
    ripple = 0.04 * np.sin(9 * x) * np.cos(11 * y)
    return (z**2 + y**2 + x**2 + ripple) < 0.45, (z**2 + (y - 0.03) ** 2 + (x + 0.02) ** 2) < 0.46


def ours(pred, ref):
    found = mask_metrics(pred, ref, SPACING_MM, 1.0)
    return [found[key] for key in ("dice", "hd95_mm", "assd_mm", "nsd")]


def monai(pred, ref):
    from monai import metrics

    first, second = (torch.from_numpy(mask)[None, None] for mask in (pred, ref))
    options = {"include_background": True, "spacing": SPACING_MM}
    return [
        float(metrics.compute_dice(first, second)),
        float(metrics.compute_hausdorff_distance(first, second, percentile=95, **options)),
        float(metrics.compute_average_surface_distance(first, second, symmetric=True, **options)),
        float(metrics.compute_surface_dice(first, second, [1.0], use_subvoxels=True, **options)),
    ]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=[200, 512, 512])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    pair, ratios, values = masks(arguments.shape), [], {}
    for turn in range(arguments.repeats):
        cpu_s = {}
        for work in (ours, monai) if turn % 2 == 0 else (monai, ours):
            start = time.process_time()
            values[work.__name__] = work(*pair)
            cpu_s[work.__name__] = time.process_time() - start
        ratios.append(cpu_s["ours"] / cpu_s["monai"])
    difference = max(abs(a - b) for a, b in zip(values["ours"], values["monai"], strict=True))
    line = {"ours_cpu_s": cpu_s["ours"], "cpu_ratio": statistics.median(ratios), "largest_difference": difference}
    sys.stdout.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
