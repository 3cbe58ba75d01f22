"""The wheel as a stranger gets it: which names it owns, and that each of its commands starts."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(PROJECT)]
    subprocess.run(build, check=True, capture_output=True)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new environment that holds the wheel; what it depends on is lent by the one the tests run in."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(root / "bin" / "python"),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    (site,) = root.glob("lib/python3*/site-packages")
    # A .pth file in a lent folder is not read, so the tree under test does not come back as an editable install.
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return root


def test_wheel__owns_only_names_that_start_with_meddino(wheel):
    names = {entry.split("/")[0] for entry in zipfile.ZipFile(wheel).namelist()}
    assert all(name.startswith("meddino") for name in names), names
    packages = {name for name in names if "." not in name}
    assert packages == {"meddino", "meddino_pretrain", "meddino_data_curation", "meddino_evaluation", "meddino_slurm"}


def test_wheel__carries_every_config_and_the_licence(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    configs = [file.relative_to(PROJECT) for file in (PROJECT / "configs").rglob("*.yaml")]
    assert configs
    assert {f"meddino/{file}" for file in configs} <= inside
    assert "meddino/py.typed" in inside
    assert any(name.endswith("LICENSE") for name in inside)


@pytest.mark.parametrize("command", COMMANDS)
def test_wheel__every_command_answers_help(environment, command, tmp_path):
    run = subprocess.run(
        [environment / "bin" / command, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert command in run.stdout
    assert "example" in run.stdout


def test_wheel__reads_its_configs_from_inside_the_package(environment, tmp_path):
    code = "from meddino.core.config import shipped_configs as s; print(s())"
    python = environment / "bin" / "python"
    folder = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True).stdout.strip()
    assert Path(folder).is_relative_to(environment)
    assert list(Path(folder).rglob("*.yaml"))
