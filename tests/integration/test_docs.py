"""Every command and every Python example in the README and in docs/ runs, in order, as a reader would type it."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import run as run_process

PROJECT = Path(__file__).resolve().parents[2]
DOCUMENTS = [PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# What a reader's long run is shortened to here. The command itself stays as it is written.
SHORTER: dict[str, list[str]] = {
    "meddino-pretrain": [
        *("stages.stage1_pretrain.steps=2", "stages.stage2_gram.steps=1", "stages.stage3_highres.steps=1"),
        *("stages.stage2_gram.method.gram_teacher.step=1", "stages.stage3_highres.method.gram_teacher.step=1"),
    ],
    "meddino-eval segment": ["training.steps=2", "seeds=[0]", "splits.folds=2"],
    "meddino-eval compare": ["training.steps=2"],
    "meddino-eval few-shot": ["few_shot.patients_per_class=[1]", "few_shot.draws=1", "split.repeats=1"],
    "meddino-eval finetune": ["finetune.epochs=1", "split.repeats=1"],
    "meddino-eval linear": ["split.repeats=1"],
}
# Set-up, other machines' programs, and what has a test of its own.
NOT_RUN_HERE = ("make", "git", "cd", "python3", "pip", "torchrun", "srun", "sbatch", "meddino-demo", "source", "nnUNetv2_train")


def _examples(document: Path) -> Iterator[tuple[str, str]]:
    for kind, body in BLOCK.findall(document.read_text()):
        if kind == "python":
            yield kind, body
        else:
            for line in body.replace("\\\n", " ").splitlines():
                if line.startswith("$ "):
                    yield kind, line[2:].split("  #")[0].strip()


def _shortened(command: str) -> list[str]:
    extra = next((words for start, words in SHORTER.items() if command.startswith(start) and "bench" not in command), [])
    return [*shlex.split(command), *extra]


def _run_examples(document: Path, folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder)}
    for kind, example in _examples(document):
        if kind == "console" and shlex.split(example)[0] in NOT_RUN_HERE:
            _check_make_target(example)
            continue
        command = [sys.executable, "-c", example] if kind == "python" else _shortened(example)
        run = run_process(command, cwd=folder, env=environment)
        assert run.returncode == 0, f"{document.name}: {example}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory) -> Path:
    """A folder with `my_scans/` (CT volumes) and `Dataset900_Phantom/` (with labels), after the README's examples."""
    folder = tmp_path_factory.mktemp("reader")
    run_process([BIN / "meddino-curate", "phantom", "--out", folder / "phantom", "--patients", "3"], check=True)
    (folder / "phantom" / "ct").rename(folder / "my_scans")
    (folder / "phantom" / "segmentation" / "Dataset900_Phantom").rename(folder / "Dataset900_Phantom")
    _run_examples(PROJECT / "README.md", folder)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document__every_example_runs(document, reader_folder):
    _run_examples(document, reader_folder)


def _check_make_target(example: str) -> None:
    words = shlex.split(example)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"make {words[1]} is no target"


@pytest.mark.parametrize("document", [PROJECT / "README.md", *DOCUMENTS], ids=lambda path: path.name)
def test_document__every_linked_file_exists(document):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing, missing


@pytest.mark.timeout(600)
def test_notebook__every_cell_runs(reader_folder):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(PROJECT / "docs" / "notebook.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # no picture is kept in the repository
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(reader_folder)}}).execute()
    said = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in said) == 2
    assert any("of the body's patches have their label" in output.get("text", "") for output in said)
