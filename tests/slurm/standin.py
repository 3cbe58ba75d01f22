"""Stands in for a command where the launcher is what is tested: starts at once, ends as it is told.

standin.py [exec --nv IMAGE NAME] MODE [VALUE] --out FOLDER
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def checkpoint(out: Path, step: int) -> None:
    (out / "stage1_pretrain" / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)


def last_step(out: Path) -> int:
    return max((int(folder.name[5:]) for folder in out.glob("stage1_pretrain/checkpoints/step-*")), default=0)


def main(words: list[str]) -> int:
    if words[0] == "exec":  # called as apptainer would be: exec --nv image meddino-pretrain ...
        words = words[4:]
    mode, out = words[0], Path(words[words.index("--out") + 1])
    value = int(words[1]) if words[1].isdigit() else 0
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    out.mkdir(exist_ok=True)
    if rank == 0:
        (out / "run.json").touch()
        if not (out / "run.json").read_text():
            (out / "run.json").write_text('{"stages": {}}')
    sys.stdout.write(f"rank {rank} says {mode}\n")
    sys.stdout.flush()
    if mode == "code":  # ends with a code
        return value
    if mode == "climb":  # one checkpoint an attempt, 75 until there are enough
        checkpoint(out, last_step(out) + 1)
        return 0 if last_step(out) >= value else 75
    if mode == "environment":
        (out / f"environment-{rank}.json").write_text(json.dumps(dict(os.environ)))
        return 0
    if mode == "die":  # rank 1 dies as if the kernel had shot it, the first time; the others would wait for ever
        if last_step(out):
            return 0
        if rank == 1:
            time.sleep(0.5)
            checkpoint(out, 1)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    if mode == "wait":  # until told to stop, then 75; the second time done
        if last_step(out):
            return 0

        def stop(number: int, frame: object) -> None:
            if rank == 0:
                checkpoint(out, 1)
            sys.exit(75)

        signal.signal(signal.SIGUSR2, stop)
        signal.signal(signal.SIGTERM, stop)
        (out / f"waiting-{rank}").touch()
        time.sleep(600)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
