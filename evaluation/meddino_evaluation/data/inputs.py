"""What a user gives to be predicted: files and folders at any depth, volumes in one file or one a channel, DICOM series."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from meddino.core.errors import ConfigError, MedDINOError, VolumeError
from meddino.core.files import atomic_write
from meddino.volumes.archives import archive_of, files_below, is_packed_folder, problem_of
from meddino.volumes.channels import case_names
from meddino.volumes.dicom.headers import read_header
from meddino.volumes.file_kinds import VOLUME_SUFFIXES, is_companion
from meddino.volumes.pictures import is_picture
from meddino.volumes.read import FoundSeries, find_series, read_volume
from meddino.volumes.volume import Volume
from meddino_evaluation.data.pictures import pixel_grid, read_planes

ENDINGS = tuple(VOLUME_SUFFIXES)
COLUMNS = ("name", "status", "reason", "notes", "input", "series_uid", "patient", "output", "picture", "measured")


@dataclass
class Input:
    """One volume, or a file that is none, and what became of it.

    Attributes:
        name: Of its output: its path below what was given, without the ending.
        files: One a channel, or those of a DICOM series.
        series: The series, for DICOM.
        status: "", then predicted, skipped or refused.
        reason: Why it was not predicted.
        output: What was written.
        picture: The overlay beside it.
        measured: How much of each label was found, with its unit.
        notes: What reading it decided or assumed.
        who: Series and patient of a DICOM series.
    """

    name: str
    files: tuple[Path, ...]
    series: FoundSeries | None = None
    status: str = ""
    reason: str = ""
    output: str = ""
    notes: str = ""
    who: dict[str, str] = field(default_factory=dict)
    picture: str = ""
    measured: dict[str, str] = field(default_factory=dict)

    def read(self, colours: int = 0) -> list[Volume]:
        """Return its channels, on one grid that says where every voxel lies.

        Args:
            colours: It is a picture, of which so many are wanted; 0 for volumes.

        Raises:
            VolumeError: They are unreadable, or lie on no grid or on several.
        """
        if colours:
            planes = read_planes(self.files[0], colours)
            return [Volume(plane, pixel_grid(*plane.shape[1:])) for plane in planes]
        parts = [self.series.read()] if self.series is not None else [read_volume(path) for path in self.files]
        for part in parts:
            if part.irregular:
                raise VolumeError(f"{self.name}: {part.irregular}: a label map could not say where its slices lie")
            if not parts[0].geometry.matches(part.geometry):
                raise VolumeError(f"{self.name}: its channels lie on different grids")
        return parts


def find_inputs(paths: Sequence[Path], out: Path, channels: int, pictures: bool = False) -> list[Input]:
    """Find every volume and say of every other file that it is none; nothing is left out without a word.

    Args:
        paths: Files, folders and archives.
        out: Folder of the results, which is not searched, by whatever path it is reached.
        channels: How many the network reads: says whether four digits at the end of a name number channels.
        pictures: Pictures are wanted instead of volumes.

    Raises:
        ConfigError: A path does not exist or lies in the folder of the results, or there is no volume at all.
    """
    found: list[Input] = []
    for path in paths:
        if not path.exists() and archive_of(path) is None:
            raise ConfigError(f"--input {path}: no such file or folder")
        is_many = path.is_dir() or is_packed_folder(path)
        if is_many and path.resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"--out {out} holds --input {path}: results and input would mix; name another folder for the results"
            )
        within = _pictures_in if pictures else _in_folder
        found += within(path, out, channels) if is_many else [Input(stem(path), (path,))]
    wanted_ones = [one for one in found if one.status != "skipped"]
    _name_apart(wanted_ones, pictures)
    if not wanted_ones:
        wanted = "picture" if pictures else f"volume ({', '.join(ENDINGS)}) and no DICOM series"
        raise ConfigError(f"--input {' '.join(map(str, paths))} holds no {wanted}")
    return found


def _name_apart(inputs: Sequence[Input], pictures: bool) -> None:
    """Number inputs of one name: from two folders that were given, or refused ones. No number gives another one's name.

    Args:
        inputs: Those that may be written.
        pictures: Label maps are pictures as overlays are, so that both may want one name.
    """
    literal, taken = {item.name for item in inputs}, set[str]()
    for item in inputs:
        number, name = 1, item.name
        while (number > 1 and name in literal) or taken & _file_names(name, pictures):
            number += 1
            name = f"{item.name}_{number}"
        taken |= _file_names(name, pictures)
        item.name = name


def _file_names(name: str, pictures: bool) -> set[str]:
    return {name, f"{name}_overlay"} if pictures else {name}


def refuse_overwriting(inputs: Iterable[Input], outputs: Iterable[Path]) -> None:
    """Refuse results that would take the place of a file that was given, or lie beside one under the same name.

    Args:
        inputs: Everything that was found, also what is not predicted.
        outputs: Files that are to be written.

    Raises:
        ConfigError: Names the input and the result.
    """
    held: dict[tuple[int, int], Path] = {}
    beside: dict[tuple[Path, str], Path] = {}
    real_folders: dict[Path, Path] = {}

    def place(path: Path) -> tuple[Path, str]:
        if path.parent not in real_folders:
            real_folders[path.parent] = path.parent.resolve()
        return real_folders[path.parent], stem(path)

    for given in (path for item in inputs for path in item.files):
        with suppress(OSError):  # it is gone: reading it will say so
            status = (archive_of(given) or given).stat()
            held[status.st_dev, status.st_ino] = given
        beside[place(given)] = given
    for output in outputs:
        taken = beside.get(place(output))
        with suppress(OSError):  # nothing is there yet
            status = output.stat()
            taken = held.get((status.st_dev, status.st_ino), taken)
        if taken is not None:
            raise ConfigError(
                f"--out: the result {output} would take the place of the input {taken}, or lie beside it under its name; "
                "name another folder"
            )


def write_table(path: Path, inputs: Sequence[Input]) -> None:
    """Write what became of every input; it names files, series and patients, so only its owner may read it."""
    with atomic_write(path, "w") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for item in inputs:
            where = ";".join(map(str, item.files)) if item.series is None else str(item.files[0].parent)
            row = {"name": item.name, "status": item.status, "reason": item.reason, "notes": item.notes, "input": where}
            row = {"series_uid": "", "patient": "", **item.who, **row, "output": item.output, "picture": item.picture}
            row["measured"] = "; ".join(f"{label} {amount}" for label, amount in item.measured.items())
            # A file's name may be bytes that no text holds.
            writer.writerow({key: value.encode("utf-8", "backslashreplace").decode() for key, value in row.items()})
    path.chmod(0o600)


def _pictures_in(folder: Path, out: Path, channels: int) -> Iterator[Input]:
    del channels  # one file has them all
    files = list(filter(_outside(folder, out), sorted(files_below(folder))))
    names = Counter(path.relative_to(folder).with_suffix("").as_posix() for path in files if is_picture(path.name))
    for path in files:
        if is_picture(path.name):
            name = path.relative_to(folder).with_suffix("").as_posix()
            # Two pictures that differ in their endings keep them, or one result would take the other's place.
            yield Input(name if names[name] == 1 else path.relative_to(folder).as_posix().replace(".", "_"), (path,))
        else:
            yield Input(path.relative_to(folder).as_posix(), (path,), None, "skipped", "no picture")


def _outside(folder: Path, out: Path) -> Callable[[Path], bool]:
    """Return whether a path below a folder lies outside of another one, whatever links lead to either."""
    real, results = folder.resolve(), out.resolve()
    return lambda path: not (real / path.relative_to(folder)).is_relative_to(results)


def _in_folder(folder: Path, out: Path, channels: int) -> Iterator[Input]:
    is_outside = _outside(folder, out)
    files = list(filter(is_outside, sorted(files_below(folder))))
    volumes = [path for path in files if path.name.endswith(ENDINGS) and not is_companion(path.name)]
    for place in dict.fromkeys(path.parent for path in volumes):
        own = [path for path in volumes if path.parent == place]
        cases = case_names(map(stem, own), channels)
        for case in dict.fromkeys(cases[stem(path)] for path in own):
            members = [path for path in own if cases[stem(path)] == case]
            name = (place.relative_to(folder) / case).as_posix()
            if len({stem(path) for path in members}) == len(members):  # several are channels
                yield Input(name, tuple(members))
                continue
            names = " and ".join(path.name for path in members)
            for path in members:
                yield Input(name, (path,), None, "refused", f"{names} in one folder mean one case: give the one that is meant")
    series = [one for one in find_series(folder) if is_outside(one.files[0])]
    places = [one.files[0].parent for one in series]
    for number, (one, place) in enumerate(zip(series, places, strict=True)):
        name = folder.name if place == folder else place.relative_to(folder).as_posix()
        name += f"_{places[: number + 1].count(place)}" if places.count(place) > 1 else ""
        item = Input(name, one.files, one, who=_who(one.files[0]))
        if one.stack is None or one.problem:
            item.status, item.reason = "refused", one.problem
        yield item
    known = {*volumes, *(file for one in series for file in one.files)}
    for path in files:
        if path not in known:
            name = path.relative_to(folder).as_posix() if path != folder else path.name
            yield Input(name, (path,), None, "skipped", problem_of(path) or "no volume and no slice of a series")


def _who(file: Path) -> dict[str, str]:
    header = read_header(file, file.name, "")
    return {} if header is None else {"series_uid": header.series_uid, "patient": header.patient_id}


def one_file_a_case(where: str, entries: Iterable[tuple[str, Path]], error: type[MedDINOError]) -> dict[str, Path]:
    """Return files by the case that each means, in the order of the cases.

    Args:
        where: What is read, for the message.
        entries: Case and file.
        error: What is raised.

    Raises:
        MedDINOError: Two files mean one case: nobody could say which of them is meant.
    """
    found: dict[str, list[Path]] = {}
    for case, path in entries:
        found.setdefault(case, []).append(path)
    for case, paths in found.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise error(f"{where}: {names} in {paths[0].parent.name}/ both mean the case '{case}'; keep one")
    return {case: paths[0] for case, paths in sorted(found.items())}


def stem(path: Path) -> str:
    """Return a file's name without a volume's ending."""
    return next((path.name.removesuffix(ending) for ending in ENDINGS if path.name.endswith(ending)), path.stem)
