"""Every meddino-submit line of docs/slurm.md is one that works."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from meddino.core.packaged import shipped_configs
from tests.slurm.conftest import PROJECT, submit

BLOCKS = re.findall(r"```bash\n(.*?)```", (PROJECT / "docs" / "slurm.md").read_text(), re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.startswith("meddino-submit ")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder in which earlier lines of the page have been submitted, on a machine without SLURM."""
    (tmp_path / "my.yaml").write_text((shipped_configs() / "slurm" / "site.yaml").read_text())
    for number, name in enumerate(("corpus", "run", "model")):
        (tmp_path / f"{name}.slurm").mkdir()
        job = {"id": str(number + 1), "name": name, "kind": "pretrain", "executor": "slurm", "keys": ["pretrain"]}
        (tmp_path / f"{name}.slurm" / "jobs.json").write_text(json.dumps({"jobs": [job | {"submitted": "", "command": []}]}))
        for rank in ("rank-0", "supervisor"):
            (tmp_path / f"{name}.slurm" / f"{number + 1}.{rank}.log").write_text("hello\n")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    return tmp_path


def test_page__has_lines():
    assert len(LINES) >= 15


@pytest.mark.parametrize("line", LINES)
def test_line__works(line, folder):
    words = shlex.split(line)[1:]
    if words[0] in ("status", "logs"):
        assert submit(*words, cwd=folder)
    elif words[0] == "cancel":
        assert "no job waits or runs" in submit(*words, cwd=folder, check=False)
    else:
        text = submit("--dry-run", *words, cwd=folder)
        assert "OMP_NUM_THREADS=" in text
