"""Speed of curation over its floor: reading the same files with SimpleITK and encoding the kept slices with Blosc2.

    python -m tests.benchmarks.bench_curation SOURCE... [--enlarge 512 --slice-mm 1] [--workers 2] [--repeats 3] [--profile]

The build and its floor take turns in one run and the smallest times are compared; processor time (user + system) stands
beside wall time, because whatever else runs on the machine stretches the one and hardly the other. A build with several
workers is measured by the processor time of all its processes: what one worker takes alone, over what the busiest core
takes among several, is how much faster they are where each has a core to itself. The report's drawings take a second
whatever the size of a corpus, so that the end of a build (duplicates, shards, manifests, report) is also told apart.
Cores that share their arithmetic units give two processes less than twice the speed whatever they do, so the floor's own work
is timed in several processes too.
`--enlarge` and `--slice-mm` first write the volumes again at the size and distance of a scanner's slices, with 12 HU of noise,
as .nii.gz and as DICOM: small files measure start-up only.
"""

import argparse
import cProfile
import multiprocessing
import pstats
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import SimpleITK as sitk
from meddino_data_curation.config import CurationConfig, PrivacyConfig, SourceConfig
from meddino_data_curation.corpus import build as build_module
from meddino_data_curation.privacy import Salt
from meddino_data_curation.selection.modality import Recognised
from meddino_data_curation.sources.candidates import Candidate
from meddino_data_curation.sources.dicom_series import DicomCandidate
from meddino_data_curation.sources.discovery import discover

from meddino.data.corpus import Corpus
from meddino.data.sample import encode_slice
from tests.data_curation.dicom_files import ct_slice

SALT = "a salt for benchmarks"


@dataclass
class Timing:
    """Smallest times of several runs.

    Attributes:
        wall_s: By the clock.
        cpu_s: User and system time of all processes.
        busiest_s: The same of the process that took most, and of the parent.
        end_s: Processor time of a build's end.
    """

    wall_s: float = float("inf")
    cpu_s: float = float("inf")
    busiest_s: float = float("inf")
    end_s: float = float("inf")

    def take(self, wall_s: float, cpu_s: float, busiest_s: float) -> None:
        self.wall_s, self.cpu_s = min(self.wall_s, wall_s), min(self.cpu_s, cpu_s)
        self.busiest_s = min(self.busiest_s, busiest_s)


class ChildrenClock:
    """Processor time of all processes below this one, looked at until they end."""

    def __init__(self) -> None:
        self.taken: dict[int, float] = {}
        self.before = _children_cpu_s()  # the server that starts workers outlives a build
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "ChildrenClock":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.stopped.wait(0.05):
            for pid, cpu_s in _children_cpu_s().items():
                self.taken[pid] = cpu_s - self.before.get(pid, 0.0)


def _children_cpu_s() -> dict[int, float]:
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[child.pid] = times.user + times.system
    return found


def timed(work: Callable[[], object], timing: Timing) -> None:
    """Run once and keep the smaller times."""
    with ChildrenClock() as children:
        wall, own = time.perf_counter(), time.process_time()
        work()
        wall, own = time.perf_counter() - wall, time.process_time() - own
    among = list(children.taken.values())
    # The parent plans and writes while its workers rest, so its time comes on top of the busiest worker's.
    timing.take(wall, own + sum(among), own + max(among, default=0.0))


def build_timed(config: CurationConfig, out: Path, timing: Timing) -> None:
    """Build a corpus and note how long its end takes."""
    plain = build_module.finish

    def watched(*given: object) -> object:
        start = time.process_time()
        info = plain(*given)  # type: ignore[arg-type]
        timing.end_s = min(timing.end_s, time.process_time() - start)
        return info

    build_module.finish = watched  # type: ignore[assignment]
    try:
        build_module.build(config, out)
    finally:
        build_module.finish = plain


def enlarged(sources: Sequence[Path], out: Path, side_px: int, slice_mm: float = 0.0) -> Path:
    """Write every volume of eight slices and more again with slices of a scanner's size; the first also as DICOM.

    Args:
        sources: Folders of .nii.gz files.
        out: Folder to write.
        side_px: Rows and columns.
        slice_mm: Largest distance of slices; 0 leaves their number.
    """
    rng = np.random.default_rng(0)
    files = [file for source in sources for file in sorted(source.rglob("*.nii.gz"))]
    for number, file in enumerate(files):
        image = sitk.ReadImage(str(file), sitk.sitkFloat32)
        if image.GetDimension() != 3 or image.GetSize()[2] < 8 or image.GetSize()[0] < 100:
            continue
        thick_mm = image.GetSpacing()[2]
        count = round(image.GetSize()[2] * max(1.0, thick_mm / slice_mm if slice_mm else 1.0))
        size = [side_px, side_px, count]
        spacing = [step * old / new for step, old, new in zip(image.GetSpacing(), image.GetSize(), size, strict=True)]
        placed = (sitk.Transform(), sitk.sitkBSpline, image.GetOrigin(), spacing, image.GetDirection(), -1000.0)
        hu = sitk.GetArrayFromImage(sitk.Resample(image, size, *placed))
        hu = np.clip(np.rint(hu + rng.normal(0, 12, hu.shape)), -1024, 3071).astype(np.int16)
        again = sitk.GetImageFromArray(hu)
        again.SetSpacing(spacing)
        again.SetDirection(image.GetDirection())
        out.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(again, str(out / f"{number:03d}.nii.gz"), useCompression=True)
        if not (out / "dicom").exists():
            (out / "dicom").mkdir()
            again_hu = np.clip(hu + rng.integers(-9, 10, hu.shape), -1024, 3071).astype(np.int16)
            for z, plane in enumerate(again_hu):
                item = ct_slice(plane, float(spacing[2] * z), PixelSpacing=[0.8, 0.8], InstanceNumber=z)
                item.save_as(out / "dicom" / f"IM{z:04d}", enforce_file_format=True)
    return out


def read_plainly(candidate: Candidate) -> np.ndarray:
    """Read one volume as a few lines with SimpleITK would."""
    if isinstance(candidate, DicomCandidate) and candidate.stack is not None:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(candidate.files[item.file]) for item in candidate.stack.slices])
        return sitk.GetArrayFromImage(reader.Execute())
    return sitk.GetArrayFromImage(sitk.ReadImage(str(candidate.files[0])))


def floor(candidates: Sequence[Candidate], kept: dict[str, int], config: CurationConfig) -> None:
    """Read every file and encode as many of its slices as the build keeps."""
    for candidate in candidates:
        voxels = read_plainly(candidate)
        voxels = voxels.reshape(-1, *voxels.shape[-2:])
        for z in range(min(kept.get(candidate.volume_id, 0), len(voxels))):
            encode_slice(Recognised("ct").stored(voxels[z]), config.shards.codec, config.shards.level)


def floors_at_once(
    candidates: Sequence[Candidate], kept: dict[str, int], config: CurationConfig, processes: int
) -> tuple[float, float]:
    """Return the seconds that one process and several take for the floor's work, start-up left out: what the cores can give."""
    largest_first = sorted(candidates, key=lambda candidate: -sum(path.stat().st_size for path in candidate.files))
    with multiprocessing.get_context("spawn").Pool(processes, _read_alone) as pool:
        pool.map(_nothing, range(8 * processes), chunksize=1)  # until every process has imported what it needs
        start = time.perf_counter()
        one_by_one = pool.starmap_async(floor, [(largest_first, kept, config)], chunksize=1)
        one_by_one.get()
        alone, start = time.perf_counter() - start, time.perf_counter()
        pool.starmap(floor, [([candidate], kept, config) for candidate in largest_first], chunksize=1)
        return alone, time.perf_counter() - start


def _read_alone() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def _nothing(_: int) -> None:
    time.sleep(0.1)


@dataclass(frozen=True)
class Measured:
    """What one benchmark found.

    Attributes:
        volumes: Read.
        slices: Kept.
        voxel_mb: Million bytes of int16 voxels of the kept slices.
        floor: Reading and encoding only.
        builds: By number of workers.
        floors: By number of processes, seconds that one and that so many take for the floor's work.
    """

    volumes: int
    slices: int
    voxel_mb: float
    floor: Timing
    builds: dict[int, Timing]
    floors: dict[int, tuple[float, float]]


def measure(sources: Sequence[Path], folder: Path, workers: Sequence[int], repeats: int) -> Measured:
    """Run the build with each number of workers and the floor, taking turns."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    (folder / "salt").write_text(SALT)
    named = tuple(SourceConfig(name=f"source-{number}", path=path) for number, path in enumerate(sources))
    privacy = PrivacyConfig(salt_file=folder / "salt")
    candidates = discover(named, Salt(SALT.encode())).candidates
    floor_timing, builds = Timing(), {count: Timing() for count in workers}
    floors = {count: (float("inf"), float("inf")) for count in workers if count > 1}
    volumes, kept, voxel_mb = 0, {}, 0.0
    for turn in range(repeats):
        for count in workers:
            out = folder / f"corpus-{turn}-{count}"
            config = CurationConfig(sources=named, workers=count, privacy=privacy)
            timed(partial(build_timed, config, out, builds[count]), builds[count])
            corpus = Corpus(out)
            volumes = corpus.info["totals"]["volumes"]
            rows = [row for row in corpus.volumes.to_pylist() if row["status"] != "rejected"]
            # Duplicates were read and encoded too before they were known for what they are.
            kept = {row["volume_id"]: row["num_slices_kept"] or row["shape"][0] for row in rows}
            voxel_mb = 2e-6 * sum(kept[row["volume_id"]] * row["shape"][1] * row["shape"][2] for row in rows)
        timed(partial(floor, candidates, kept, CurationConfig()), floor_timing)
        for count, least in floors.items():
            alone, together = floors_at_once(candidates, kept, CurationConfig(), count)
            floors[count] = min(alone, least[0]), min(together, least[1])
    return Measured(volumes, sum(kept.values()), voxel_mb, floor_timing, builds, floors)


def as_table(measured: Measured) -> str:
    """Return the figures, their ratio to the floor (of processor times) and the gain of more workers."""
    lines = [
        f"{measured.volumes} volumes, {measured.slices} slices encoded, {measured.voxel_mb:.0f} MB of int16",
        f"{'what':<20}{'wall s':>8}{'CPU s':>8}{'volumes/s':>11}{'slices/s':>10}{'MB/s':>8}{'of floor':>10}"
        f"{'its end':>9}{'without':>9}",
    ]
    rows = [("floor", measured.floor), *((f"{count} worker(s)", timing) for count, timing in measured.builds.items())]
    for name, timing in rows:
        per_s = [value / timing.wall_s for value in (measured.volumes, measured.slices, measured.voxel_mb)]
        share = measured.floor.cpu_s / timing.cpu_s
        lines.append(
            f"{name:<20}{timing.wall_s:>8.2f}{timing.cpu_s:>8.2f}{per_s[0]:>11.2f}{per_s[1]:>10.1f}{per_s[2]:>8.1f}{share:>10.2f}"
        )
        if timing.end_s < float("inf"):
            lines[-1] += f"{timing.end_s:>8.2f}s{measured.floor.cpu_s / (timing.cpu_s - timing.end_s):>9.2f}"
    if 1 in measured.builds:
        alone = measured.builds[1]
        for count, timing in measured.builds.items():
            if count > 1:
                one, several = measured.floors[count]
                lines.append(
                    f"{count} workers over one: {alone.wall_s / timing.wall_s:.2f} x by the clock, where the floor's own work "
                    f"in {count} processes gains {one / several:.2f} x; {alone.cpu_s / timing.busiest_s:.2f} x by CPU"
                )
    return "\n".join(lines)


def profiled(sources: Sequence[Path], folder: Path) -> str:
    """Return where one worker's time goes, by function."""
    named = tuple(SourceConfig(name=f"source-{number}", path=path) for number, path in enumerate(sources))
    config = CurationConfig(sources=named, workers=1, privacy=PrivacyConfig(salt_file=folder / "salt"))
    profile = cProfile.Profile(time.process_time)
    profile.runcall(build_module.build, config, folder / "profiled")
    stats = pstats.Stats(profile)
    total = stats.total_tt  # type: ignore[attr-defined]
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:22]  # type: ignore[attr-defined]
    lines = [f"{'share':>6}{'own s':>8}{'with s':>8}{'calls':>9}  where"]
    for (file, line, name), (_, calls, own, cumulative, _) in rows:
        lines.append(f"{own / total:>6.1%}{own:>8.2f}{cumulative:>8.2f}{calls:>9}  {Path(file).name}:{line} {name}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_curation", description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--enlarge", type=int, default=0, help="[px] write the volumes again with slices of this side")
    parser.add_argument("--slice-mm", type=float, default=0.0, help="with --enlarge: largest distance of slices")
    parser.add_argument("--workers", type=int, default=2, help="measured beside one worker; 1: not measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also print where one worker's time goes")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-curation-") as name:
        folder = Path(name)
        sources = given.sources
        if given.enlarge:
            sources = [enlarged(sources, folder / "enlarged", given.enlarge, given.slice_mm)]
        sys.stdout.write(as_table(measure(sources, folder, sorted({1, given.workers}), given.repeats)) + "\n")
        if given.profile:
            sys.stdout.write(profiled(sources, folder) + "\n")


if __name__ == "__main__":
    main()
