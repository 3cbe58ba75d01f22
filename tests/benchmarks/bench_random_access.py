"""How many slices a second one core reads at random from a corpus on the local disk, decode included.

    python -m tests.benchmarks.bench_random_access CORPUS [--reads 2000] [--repeats 5]

The smallest of several times counts, by the clock and by processor time; slices per second also for 512 x 512 pixels,
should those of the corpus have another size.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from meddino.data.corpus import Corpus


def measure(corpus: Corpus, reads: int, repeats: int) -> dict[str, float]:
    """Return slices per second and the mean size of a slice."""
    picks = np.random.default_rng(0).integers(0, len(corpus), reads).tolist()
    wall_s = cpu_s = float("inf")
    pixels = 0
    for _ in range(repeats):
        pixels, wall, cpu = 0, time.perf_counter(), time.process_time()
        for index in picks:
            pixels += corpus.read(index).size
        wall_s, cpu_s = min(wall_s, time.perf_counter() - wall), min(cpu_s, time.process_time() - cpu)
    return {
        "slices": len(corpus),
        "pixels_a_slice": pixels / reads,
        "slices_per_s": reads / wall_s,
        "slices_per_cpu_s": reads / cpu_s,
        "slices_512_per_cpu_s": pixels / 512**2 / cpu_s,
    }


def main(argv: list[str] | None = None) -> None:
    """Print one line a figure."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_random_access", description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--reads", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(argv)
    for name, value in measure(Corpus(given.corpus), given.reads, given.repeats).items():
        sys.stdout.write(f"{name:<22}{value:>12.0f}\n")


if __name__ == "__main__":
    main()
