import subprocess
import sys
import time
from pathlib import Path

CHILD = """
import os, time
from meddino.distributed.launcher import end_with
end_with(os.getppid())
print("on", flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"  # a zombie has ended
    except FileNotFoundError:
        return False


def test_end_with__a_child_ends_with_its_parent_whatever_kills_it():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert _is_running(child)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 5
    while _is_running(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _is_running(child)


def test_end_with__a_parent_that_is_gone_already():
    code = "from meddino.distributed.launcher import end_with; end_with(1 << 22); print('went on')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
