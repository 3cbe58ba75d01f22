"""Every meddino-submit line of docs/slurm.md is one that works."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from meddino_pretrain.cli import main as pretrain

from meddino.core.config import shipped_configs
from meddino.models.registry import build_backbone
from tests.slurm.conftest import PROJECT, submit

BLOCKS = re.findall(r"```bash\n(.*?)```", (PROJECT / "docs" / "slurm.md").read_text(), re.DOTALL)
README = re.findall(r"```(?:bash|console)\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
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


PRETRAIN = sorted(
    {
        re.sub(r"--out \S+", "--out run", line.partition(" pretrain ")[2])
        for block in [*BLOCKS, *README]
        for line in block.splitlines()
        if "meddino-submit" in line and " pretrain " in line and " bench " not in line
    }
)


def write_zero_weights(path: Path, backbone: str) -> None:
    """Write a weights file of a backbone, all zeros and with holes on the disk, but for the periods of its rotary embedding."""
    periods = build_backbone("vits16").state_dict()["rope_embed.periods"]  # of every backbone with heads of 64
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in build_backbone(backbone).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.seek(8 + len(text) + header["rope_embed.periods"]["data_offsets"][0])
        file.write(periods.float().numpy().tobytes())


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory, corpus):
    """A folder with the corpus and the weights that the pages name."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "corpus").symlink_to(corpus)
    write_zero_weights(folder / "dinov3_vitb16.safetensors", "vitb16")
    return folder


@pytest.mark.parametrize("line", PRETRAIN)
def test_pretrain_line__would_not_fail_in_the_queue(line, reader_folder, monkeypatch, capsys):
    monkeypatch.chdir(reader_folder)
    assert pretrain([*shlex.split(line), "--plan", "--machine", "1x8xa100", "--warn-disk"]) == 0, capsys.readouterr().err
    assert "weights" in capsys.readouterr().out or "init.weights" not in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smoke", "--corpus", "corpuss"], "corpuss"),
        (["smok", "--corpus", "corpus"], "no config file 'smok'"),
        (["ct3m_vitb", "--corpus", "corpus"], "give init.weights=FILE"),
    ],
)
def test_submission__what_the_command_would_refuse_is_not_queued(words, said, reader_folder):
    answer = submit("--dry-run", "pretrain", *words, "--out", "run", cwd=reader_folder, check=False, checked=True)
    assert answer.startswith("2 meddino-submit: error: ") and said in answer and "\n" not in answer


def test_submission__says_what_the_run_would_take(reader_folder):
    words = ("--cluster", "dgx", "--dry-run", "--set", "pretrain.tasks_per_node=2")
    text = submit(*words, "pretrain", "smoke", "--corpus", "corpus", "--out", "run", cwd=reader_folder, checked=True)
    assert "# plan for 2 x a100" in text and "# stage3_highres" in text
