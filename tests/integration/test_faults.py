"""What each fault does to each long command, as the table in docs/faults.md has it; nothing that was finished is lost."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from meddino_evaluation.tasks.fake_data import make_fake as make_task

from meddino.core.files import sha256_file
from tests.data.tiny_corpus import write_corpus
from tests.data_curation.conftest import make_hu, write_volume
from tests.evaluation.detection.conftest import QUICK as QUICK_DETECTOR
from tests.evaluation.detection.conftest import write_boxes
from tests.evaluation.segmentation.conftest import write_dataset
from tests.pretrain.conftest import disc_slice
from tests.processes import run

DOCS = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
TINY = Path(__file__).resolve().parents[1] / "pretrain" / "tiny.yaml"
START = "from tests.integration.faults import main; raise SystemExit(main())"
FAULTS = {
    "SIGTERM": "SIGTERM, SIGHUP, SIGUSR1, SIGUSR2",
    "SIGINT": "Ctrl-C",
    "SIGKILL": "SIGKILL",
    "full disk": "disk full",
    "small /dev/shm": "/dev/shm full",
    "worker killed": "a worker killed",
}
ALSO = {"SIGHUP": "SIGTERM", "SIGUSR1": "SIGTERM", "small disk": "full disk"}
"""Faults that end as another of the table: a small disk is a real one, where this process may mount it."""

pytestmark = pytest.mark.timeout(600)  # a busy machine: each starts a command twice


@dataclass(frozen=True)
class Command:
    """A long command, what faults do to it, and how it is tried here.

    Attributes:
        name: As in the docs.
        shm: Exit code where /dev/shm is full; None where the command does not use it.
        worker: Exit code where a worker is killed; None where it has none.
        kept: What is not done twice, for the docs.
        again: What the same command does, for the docs.
        words: Of the trial; {root} holds the inputs, {build} and the like what other commands wrote.
        same: Files that are the same bytes as without the fault.
        stays: Files that stand after a fault at half way, and are not made anew by the same command.
        copies: Folders of another command's result that this one changes, or reads.
        disk: Exit code where the disk is full; None where nothing is written.
    """

    name: str
    shm: int | None
    worker: int | None
    kept: str
    again: str
    words: str
    same: tuple[str, ...]
    stays: tuple[str, ...] = ()
    copies: tuple[str, str] | None = None
    disk: int | None = 2

    def code(self, fault: str) -> int | None:
        """Return what it ends with."""
        codes = {"SIGTERM": 75, "SIGINT": 130, "SIGKILL": -9, "full disk": self.disk, "small /dev/shm": self.shm}
        return {**codes, "worker killed": self.worker}[ALSO.get(fault, fault)]

    def row(self) -> str:
        """Return its row in the docs."""
        codes = ["killed" if (code := self.code(fault)) == -9 else "-" if code is None else str(code) for fault in FAULTS]
        return f"| `{self.name}` | {' | '.join(codes)} | {self.kept} | {self.again} |"


_CURATED = "corpus/**/*"
_OLD_OR_NEW = "the corpus as it was, or as it will be; volumes that were read"
_QUICK = "features.image_size_px=32 split.repeats=1 linear.min_steps=5 linear.learning_rates=[0.01] statistics.resamples=20"
_LABELLED = "--model random:vitnano8 --data ct_contrast --root {root}/ct_contrast --out out "
_NETWORKS = (
    "--config demo training.steps=6 training.batch_size=2 training.crop_px=32 training.crops=grid training.save_every_steps=2 "
    "labels.train_slices=4 splits.folds=2 head.name=linear inference.mirror=false metrics.surface=false training.lr_head=0.01"
)
_PROMPTS = (
    "size_px=48 decoder.mlp_dim=64 decoder.layers=1 training.steps=4 training.batch_size=2 seeds=[0,1] splits.folds=2 "
    "metrics.surface=false metrics.bootstrap=100"
)
COMMANDS = {
    "build": Command(
        "meddino-curate build", 0, 0, "volumes that were read, shards that are written", "goes on, the same bytes",
        "meddino-curate build {root}/in --out corpus workers={readers} shards.size_mib=0.05 privacy.salt_file={root}/salt",
        (_CURATED,), ("corpus/.work/volumes/*/*.json",),
    ),
    "add": Command(
        "meddino-curate add", 0, 0, _OLD_OR_NEW, "goes on, the same bytes",
        "meddino-curate add {root}/more --to corpus workers={readers} --salt-file {root}/salt",
        (_CURATED,), copies=("build", "corpus*"),
    ),
    "erase": Command(
        "meddino-curate erase", 0, None, "the corpus as it was, or as it will be", "goes on, the same bytes",
        "meddino-curate erase corpus --volume 1.nii.gz --salt-file {root}/salt",
        (_CURATED,), copies=("build", "corpus*"),
    ),
    "merge": Command(
        "meddino-curate merge", 0, None, "the parts; shards that were copied", "goes on, the same bytes",
        "meddino-curate merge {build}/corpus {more}/corpus --out corpus", (_CURATED,),
    ),
    "audit": Command(
        "meddino-curate audit", 0, None, "the corpus as it was", "audits anew, the same bytes",
        "meddino-curate audit corpus --against {root}/more --salt-file {root}/salt", (_CURATED,), copies=("build", "corpus*"),
    ),
    "phantom": Command(
        "meddino-curate phantom", 0, None, "what stood there before", "makes it anew, the same bytes",
        "meddino-curate phantom --out cohort --patients 1", ("cohort/**/*",),
    ),
    "verify": Command(
        "meddino-curate verify", 0, None, "nothing, it only reads", "checks anew", "meddino-curate verify corpus",
        (_CURATED,), copies=("build", "corpus*"), disk=None,
    ),
    "plan": Command(
        "meddino-curate plan", 0, None, "what stood there before", "looks anew, the same bytes",
        "meddino-curate plan licences.allow=[LicenseRef-AbdomenCT-1K-unclear] --root {root}/sets --out sets.yaml",
        ("sets.yaml",),
    ),
    "pretrain": Command(
        "meddino-pretrain", 0, 75, "after a signal every step, else up to the last checkpoint", "goes on, the same bytes",
        "meddino-pretrain {recipe} --corpus {root}/tiny --out run --stage stage1_pretrain loader.workers={loaders} "
        "stages.stage1_pretrain.steps=16",
        ("run/*/checkpoints/step-*16/*.safetensors",),
    ),
    "export": Command(
        "meddino-export", 0, None, "what stood there before", "exports anew, the same bytes",
        "meddino-export {pretrain}/run --out model --to safetensors,timm", ("model/**/*",),
    ),
    "segment": Command(
        "meddino-eval segment", 0, None, "networks that are trained, the last `training.save_every_steps`",
        "goes on, the same bytes", "meddino-eval segment --model random:vitnano8 --data {root}/blobs --out out "
        "encoder.mode=finetune seeds=[0,1] " + _NETWORKS,
        ("out/weights/*.safetensors", "out/cases.csv", "out/predictions/**/*"), ("out/weights/fold-0_seed-0.safetensors",),
    ),
    "predict": Command(
        "meddino-eval predict", 0, None, "label maps that are written", "goes on, the same bytes",
        "meddino-eval predict --results {segment}/out --input {root}/blobs/imagesTr --out out",
        ("out/**/*",), ("out/*.nii.gz",),
    ),
    "probe": Command(
        "meddino-eval probe", 0, None, "nothing, it takes half a minute", "measures anew, the same bytes",
        "meddino-eval probe --model m=random:vitnano8 --data {root}/blobs --out out seeds=[0] bootstrap=100 "
        "data.resample=native train_slices=4 case_slices=2 blocks=[1]", ("out/**/*",),
    ),
    "prompt": Command(
        "meddino-eval prompt", 0, None, "decoders that are trained", "goes on, the same bytes",
        "meddino-eval prompt --model random:vitnano8 --data {root}/blobs --out out " + _PROMPTS,
        ("out/weights/*.safetensors", "out/cases.csv", "out/predictions/**/*"), ("out/weights/fold-0_seed-0.safetensors",),
    ),
    "compare": Command(
        "meddino-eval compare", 0, None, "runs that are done; of the one under way as `segment`", "goes on, the same bytes",
        "meddino-eval compare --model m=random:vitnano8 --modes frozen finetune --data {root}/blobs --out out seeds=[0] "
        + _NETWORKS.replace("steps=6", "steps=2"),
        ("out/comparison*", "out/runs/*/cases.csv", "out/runs/*/weights/*.safetensors"), ("out/runs/*/metrics.json",),
    ),
    "score": Command(
        "meddino-eval score", 0, None, "what stood there before", "measures anew, the same bytes",
        "meddino-eval score --pred {predict}/out --ref {root}/blobs/labelsTr --out out", ("out/*",),
    ),
    "linear": Command(
        "meddino-eval knn, linear", 0, None, "features of images", "learns anew, the same bytes",
        "meddino-eval linear " + _LABELLED + "protocols=[knn,linear] " + _QUICK,
        ("out/per_case.csv", "out/splits/*"), ("out/features/**/*.safetensors",),
    ),
    "few-shot": Command(
        "meddino-eval few-shot", 0, None, "features of images", "learns anew, the same bytes",
        "meddino-eval few-shot " + _LABELLED + "few_shot.patients_per_class=[1,2] few_shot.draws=2 " + _QUICK,
        ("out/per_case.csv", "out/splits/*"), ("out/features/**/*.safetensors",),
    ),
    "finetune": Command(
        "meddino-eval finetune", 0, None, "nothing: a study keeps jobs that are done", "learns anew, the same bytes",
        "meddino-eval finetune " + _LABELLED + "finetune.epochs=1 " + _QUICK, ("out/per_case.csv", "out/splits/*"),
    ),
    "retrieve": Command(
        "meddino-eval retrieve", 0, None, "features of images", "measures anew, the same bytes",
        "meddino-eval retrieve " + _LABELLED + _QUICK, ("out/per_case.csv",), ("out/features/**/*.safetensors",),
    ),
    "detect": Command(
        "meddino-eval detect", 0, None, "detectors that are trained, the last `training.val_every_epochs`",
        "goes on, the same bytes",
        f"meddino-eval detect --model random:vitnano8 --data {{root}}/boxes/boxes.csv --out out {' '.join(QUICK_DETECTOR)} "
        "split.repeats=2",
        ("out/weights/*", "out/per_case.csv", "out/splits/*"), ("out/weights/repeat-0.safetensors",),
    ),
    "prepare": Command(
        "meddino-eval tasks prepare", 0, None, "label maps that are written", "makes it anew, the same bytes",
        "meddino-eval tasks prepare kvasir_seg --root {root}/kvasir_seg --out out", ("out/**/*",),
    ),
    "study": Command(
        "meddino-eval study", 0, None, "jobs that are done", "goes on, the same bytes",
        "meddino-eval study compare --config {root}/study.yaml --data-root {root} --out out",
        ("out/jobs/*/per_case.csv", "out/results*.csv"), ("out/jobs/*/metrics.json",),
    ),
    "visualize": Command(
        "meddino-eval visualize", 0, None, "features of images", "draws anew, the same bytes",
        "meddino-eval visualize " + _LABELLED + "--size 32 --image {root}/in/0.nii.gz",
        ("out/*",),
    ),
    "demo": Command(
        "meddino-demo", 0, None, "steps that are done; of the one under way as its command", "goes on, the same bytes",
        "meddino-demo --data {root}/own --out out",
        ("out/corpus/**/*", "out/run/*/checkpoints/step-*16/*.safetensors"), ("out/corpus/**/*",),
    ),
}  # fmt: skip
STUDY = """
models: ["random:vitnano8"]
data: [{dataset: ct_contrast, root: ct_contrast}]
protocols: [knn, logistic]
evaluation:
  features: {image_size_px: 32, device: cpu}
  split: {repeats: 1}
  statistics: {resamples: 20}
"""


class Results:
    """What commands write where nothing goes wrong; each is run once, when it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for seed in range(6):
            write_volume(root / ("in" if seed < 4 else "more") / f"{seed}.nii.gz", make_hu(seed))
        (root / "salt").write_text("a salt for tests of faults\n")
        write_dataset(root / "blobs")
        shutil.copytree(root / "in", root / "own" / "ct")
        shutil.copytree(root / "blobs", root / "own" / "Dataset001_Blobs")
        write_volume(root / "sets" / "AbdomenCT-1K" / "Case_00001_0000.nii.gz", make_hu(0))
        write_boxes(root / "boxes")
        make_task("kvasir_seg", root / "kvasir_seg", 4)
        write_corpus(root / "tiny", [disc_slice(number, 96, 80) for number in range(24)])
        self._made: dict[str, tuple[Path, int]] = {}

    def words(self, name: str, fault: str = "") -> list[str]:
        """Return a command with its inputs."""
        text = COMMANDS["build"].words.replace("{root}/in", "{root}/more") if name == "more" else COMMANDS[name].words
        if name == "study" or "ct_contrast" in text:
            self._labelled_images()
        others = {other: self.of(other)[0] for other in (*COMMANDS, "more") if f"{{{other}}}" in text}
        readers = 2 if fault in ("worker killed", "small /dev/shm") else 1
        return text.format(root=self.root, recipe=TINY, readers=readers, loaders=1 if fault else 0, **others).split()

    def _labelled_images(self) -> None:
        from meddino_evaluation.classification.fake_data import make_fake

        if not (self.root / "study.yaml").exists():
            make_fake("ct_contrast", self.root / "ct_contrast")
            (self.root / "study.yaml").write_text(STUDY)

    def of(self, name: str) -> tuple[Path, int]:
        """Return the folder in which a command has worked, and its number of writes."""
        if name not in self._made:
            folder = self.root / "whole" / name
            prepare(self, name, folder)
            ended = attempt("none", 0, self.words(name), folder)
            assert ended.returncode == 0, ended.stderr[-3000:]
            self._made[name] = folder, int(_count(folder).read_text())
        return self._made[name]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    return Results(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def folder(request, tmp_path) -> Iterator[Callable[[int], Path]]:
    """A function that makes the folder to work in: a file system of so many bytes, or an ordinary one for 0."""
    place = tmp_path / "work"
    place.mkdir()
    mounted: list[Path] = []

    def make(size: int) -> Path:
        if size:
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
            if subprocess.run(command, capture_output=True, check=False).returncode != 0:
                pytest.skip("needs the right to mount a small file system")
            mounted.append(place)
        return place

    yield make
    for one in mounted:
        subprocess.run(["umount", "-l", str(one)], check=True)


def _count(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.count")


def attempt(fault: str, place: int, words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder with a fault at its so-many-th write."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return run([sys.executable, "-c", START, fault, place, _count(folder), *words], env=clean, cwd=folder, timeout=280)


def prepare(results: Results, name: str, folder: Path) -> None:
    """Put there what the command changes."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = COMMANDS[name].copies if name in COMMANDS else None
    if copies:
        for source in results.of(copies[0])[0].glob(copies[1]):
            shutil.copytree(source, folder / source.name)


def _files(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    found = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in found}


def _standing(folder: Path, patterns: tuple[str, ...]) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in _files(folder, patterns)}


def _bytes(folder: Path) -> int:
    """Return what files take on a tmpfs, whose pages are of 4 KiB."""
    return sum(4096 * math.ceil(path.stat().st_size / 4096) for path in folder.rglob("*") if path.is_file())


_SLOW = ("audit", "phantom", "compare", "score", "few-shot", "finetune", "detect", "demo")
"""Tried in the slow tests only: others do the same with the same code."""


def _trials() -> Iterator[object]:
    for name, command in COMMANDS.items():
        for fault in (*FAULTS, *ALSO):
            if command.code(fault) is not None:
                fast = fault == "SIGTERM" and name not in _SLOW
                yield pytest.param(name, fault, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "fault"), list(_trials()))
def test_fault__ends_as_the_table_says_and_the_same_command_goes_on(results, folder, name, fault):
    command, (whole, writes) = COMMANDS[name], results.of(name)
    size = 0
    if fault == "small disk":
        before = _bytes(results.of(command.copies[0])[0]) if command.copies else 0
        size = before + max(4096, max(_bytes(whole) - before, _bytes(whole) // 4) // 8192 * 4096)
    here = folder(size)
    prepare(results, name, here)
    if size and _bytes(whole) <= 4096:  # the smallest disk would do
        (here / "filler").write_bytes(b"x" * size)

    ended = attempt(fault, max(1, writes // 2), results.words(name, fault), here)
    assert ended.returncode == command.code(fault), ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr
    if ended.returncode in (2, 75, 130):
        assert len([line for line in ended.stderr.splitlines() if line.startswith("meddino-")]) == 1, ended.stderr[-3000:]
    if ended.returncode != 0:
        standing = {} if size else _standing(here, command.stays)  # when a real disk is full, something was under way
        assert standing or not command.stays or size
        if size:
            subprocess.run(["mount", "-o", "remount,size=256m", str(here)], check=True)
        again = attempt("none", 0, results.words(name), here)
        assert again.returncode == 0, again.stderr[-3000:]
        after = _standing(here, command.stays)
        assert all(after.get(one, moment) == moment for one, moment in standing.items())  # may be gone, is not made anew
    assert _files(here, command.same) == _files(whole, command.same)
    assert [path.name for path in here.rglob("*") if path.name.endswith((".partial", ".old")) or "partial-" in path.name] == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "pretrain" else pytest.mark.slow) for name in COMMANDS]
)
def test_few_open_files__cost_one_line_or_nothing(results, tmp_path, name):
    command, (whole, _) = COMMANDS[name], results.of(name)
    prepare(results, name, tmp_path / "work")
    ended = attempt("few files", 0, results.words(name, "few files"), tmp_path / "work")
    assert ended.returncode in (0, 2), ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 0 or "ulimit -n" in ended.stderr or "too many open files" in ended.stderr.lower()
    if ended.returncode == 2:
        assert attempt("none", 0, results.words(name), tmp_path / "work").returncode == 0
    assert _files(tmp_path / "work", command.same) == _files(whole, command.same)


def test_docs__have_the_table():
    header = f"| command | {' | '.join(FAULTS.values())} | what is kept | the same command again |"
    rows = [header, "|" + "---|" * (len(FAULTS) + 3), *(command.row() for command in COMMANDS.values())]
    assert "\n".join(rows) in DOCS.read_text()
