"""How memory and time of a step grow with prototypes, batch, tokens and processes, and how long the trainer takes to start.

    python -m tests.benchmarks.bench_growth --backbone vitt16 --steps 3 --threads 2

Each line is a process of its own, for memory is that of the whole process. Times are the fastest of the steps measured.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from meddino_pretrain.monitoring.metrics import read_metrics

from tests.pretrain.conftest import disc_slice, write_corpus

STAGE = "stage1_pretrain"
BASE = {"batch": 4, "global-size": 96, "local-size": 48, "locals": 4, "prototypes": 8192}
VARIATIONS: dict[str, dict[str, int]] = {
    "as it is": {},
    "4 x the prototypes": {"prototypes": 4 * 8192},
    "2 x the batch": {"batch": 8},
    "4 x the batch": {"batch": 16},
    "4 x the tokens (2 x the side)": {"global-size": 192, "local-size": 96},
    "2 x the local crops": {"locals": 8},
}


def bench_step(backbone: str, steps: int, threads: int, options: dict[str, int], *flags: str) -> dict[str, Any]:
    """Run `meddino-pretrain bench step` in a process of its own."""
    words = [word for name, value in {**BASE, **options}.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "meddino_pretrain.cli", "bench", "step", "--backbone", backbone, *words, *flags]
    command += ["--steps", str(steps), "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def growth_rows(backbone: str, steps: int, threads: int) -> list[tuple[str, float, float]]:
    """Return (what, seconds a step, MiB of the process) for one thing changed at a time."""
    rows = []
    for name, options in VARIATIONS.items():
        result = bench_step(backbone, steps, threads, options)
        rows.append((name, result["s_per_step_min"], result["peak_mib"]))
    result = bench_step(backbone, steps, threads, {}, "--gram")
    rows.append(("Gram teacher at 2 x the side", result["s_per_step_min"], result["peak_mib"]))
    result = bench_step(backbone, steps, threads, {"batch": 16}, "--checkpointing")
    rows.append(("4 x the batch, activation checkpointing", result["s_per_step_min"], result["peak_mib"]))
    return rows


def _recipe_options(backbone: str, steps: int) -> list[str]:
    sizes = f"[{{global_px: {BASE['global-size']}, local_px: {BASE['local-size']}, gram_px: null, weight: 1.0}}]"
    heads = [f"stages.{STAGE}.method.heads.{head}.prototypes={BASE['prototypes']}" for head in ("dino", "ibot")]
    stage = [f"stages.{STAGE}.steps={steps}", f"stages.{STAGE}.global_batch={BASE['batch']}"]
    later = [f"stages.{name}.method.gram_teacher.step={steps}" for name in ("stage2_gram", "stage3_highres")]
    crops = [f"stages.{STAGE}.method.crops.sizes={sizes}", f"stages.{STAGE}.method.crops.num_local={BASE['locals']}"]
    quiet = ["probe.every_steps=0", "saving.every_steps=1000", "saving.tensorboard=false", "loader.workers=0"]
    return [f"backbone.name={backbone}", "backbone.changes={}", *heads, *stage, *later, *crops, *quiet]


def processes_row(backbone: str, steps: int, corpus: Path, run: Path, count: int, parallel: str) -> tuple[str, float, float]:
    """Train the base size with some processes of one thread each; memory is that of one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = [*_recipe_options(backbone, steps + 1), f"machine.parallel={parallel}"]
    command = [sys.executable, "-m", "meddino_pretrain.cli", "smoke", "--corpus", str(corpus), "--out", str(run)]
    command += ["--stage", STAGE, *options]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    alone = {key: value for key, value in shared.items() if not key.startswith(("WORLD", "MASTER"))}
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else alone,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    errors = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(errors))
    timings = [record["timing"] for record in read_metrics(run / STAGE / "metrics.jsonl")][1:]
    name = f"{count} process{'es' if count > 1 else ''} of one thread{f', {parallel}' if count > 1 else ''}"
    return name, min(timing["step_s"] for timing in timings), max(timing["peak_memory_mib"] for timing in timings)


def startup_s(corpus: Path, run: Path) -> float:
    """Return the seconds from the command to the first step's record, with the smoke recipe as it is."""
    command = [sys.executable, "-m", "meddino_pretrain.cli", "smoke", "--corpus", str(corpus), "--out", str(run)]
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = run / STAGE / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(str(process.stderr.read() if process.stderr else ""))
        time.sleep(0.02)
    taken = time.monotonic() - start
    process.kill()
    process.communicate()
    return taken


def as_markdown(rows: list[tuple[str, float, float]]) -> str:
    """Return the rows as a table, with their ratios to the first."""
    _, first_s, first_mib = rows[0]
    lines = ["| | s a step | x | MiB | more than the first |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {s:.2f} | {s / first_s:.1f} | {mib:.0f} | {mib - first_mib:+.0f} |" for name, s, mib in rows]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the tables and the start-up time."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_growth", description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="vitt16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(argv)
    sys.stdout.write(f"{as_markdown(growth_rows(given.backbone, given.steps, given.threads))}\n\n")
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus", [disc_slice(number, 256, 256) for number in range(24)])
        kinds = [(1, "auto"), (2, "ddp"), (2, "fsdp2")]
        rows = [
            processes_row(given.backbone, given.steps, corpus, Path(folder) / f"run{number}", *kind)
            for number, kind in enumerate(kinds)
        ]
        sys.stdout.write(f"{as_markdown(rows)}\n\n")
        sys.stdout.write(f"start-up, smoke recipe: {startup_s(corpus, Path(folder) / 'smoke'):.1f} s\n")


if __name__ == "__main__":
    main()
