"""`meddino-eval predict`: label maps of new volumes or DICOM series, as NIfTI or DICOM-SEG, and a picture of each."""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

import meddino
from meddino.core.errors import ConfigError, MedDINOError, VolumeError
from meddino.core.files import atomic_write, canonical_json, write_json
from meddino.core.logging import console, get_logger
from meddino.data.intensity import MEMBERS, Modality
from meddino.volumes.archives import archive_of
from meddino.volumes.writing import write_label_map
from meddino_evaluation.data.inputs import Input, find_inputs, refuse_overwriting, write_table
from meddino_evaluation.data.pictures import write_mask_picture
from meddino_evaluation.prompts.config import BUNDLE_FILE
from meddino_evaluation.segmentation.inference.bundle import Bundle, load_bundle
from meddino_evaluation.segmentation.overlay import label_colours, mask_overlay_png

logger = get_logger(__name__)
TABLE = "predictions.csv"
DONE = "done.json"
ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval predict`."""
    parser.add_argument("--results", required=True, type=Path, help="--out folder of a finished meddino-eval segment")
    parser.add_argument(
        "--input", required=True, nargs="+", type=Path, help="volumes, DICOM files' folders, or folders of both at any depth"
    )
    parser.add_argument("--out", required=True, type=Path, help=f"folder for the label maps and {TABLE}")
    parser.add_argument("--fold", nargs="+", default=["0"], help="whose networks; several or 'all': an ensemble")
    parser.add_argument("--seed", nargs="+", default=["0"], help="whose networks; several or 'all': an ensemble")
    parser.add_argument("--model", help="where the encoder is now, if it has moved")
    parser.add_argument(
        "--box",
        action="append",
        default=[],
        metavar="[SLICE:]X0,Y0,X1,Y1",
        help="with what `prompt` has trained; several allowed",
    )
    parser.add_argument("--point", action="append", default=[], metavar="[SLICE:]X,Y", help="a point inside; several allowed")
    parser.add_argument("--format", choices=("nifti", "dicomseg"), default="nifti", help="dicomseg needs DICOM input")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval predict`: every input ends in the table, and the exit code is 2 if one was refused."""
    if arguments.box or arguments.point or (arguments.results / BUNDLE_FILE).is_file():
        from meddino_evaluation.prompts.predict import run_boxes

        folds, seeds = (numbers(words, option) for words, option in ((arguments.fold, "--fold"), (arguments.seed, "--seed")))
        if folds is None or seeds is None or len(folds) != 1 or len(seeds) != 1:
            raise ConfigError("--box and --point take one network: give one --fold and one --seed")
        sys.stdout.write(run_boxes(arguments, folds[0], seeds[0]))
        return
    bundle = load_bundle(
        arguments.results, numbers(arguments.fold, "--fold"), numbers(arguments.seed, "--seed"), arguments.model
    )
    inputs = find_inputs(arguments.input, arguments.out, bundle.channels, bundle.flat)
    skip_other_modalities(inputs, bundle.modality)
    if arguments.format == "dicomseg" and not any(item.series for item in inputs):
        raise ConfigError("--format dicomseg needs DICOM series as input: a DICOM-SEG refers to the slices it was made from")
    check_outputs(inputs, arguments.out, arguments.format, bundle.flat)
    done = Done(arguments.out, f"{bundle.identity} {arguments.format} {meddino.__version__}")
    open_ = [item for item in inputs if not item.status]
    todo = [item for item in open_ if not done.take(item)]
    if len(todo) < len(open_):
        logger.info("%d of %d volumes are predicted already", len(open_) - len(todo), len(open_))
    logger.info("%d volumes, %d other files, %d networks", len(todo), len(inputs) - len(todo), bundle.size)
    write_table(arguments.out / TABLE, inputs)  # from now on the folder is ours, whatever ends this
    started = time.monotonic()
    for number, item in enumerate(todo, start=1):
        try:
            predict_one(item, bundle, arguments.out, arguments.format)
            item.status = "predicted"
            done.add(item)
        except VolumeError as error:
            item.status, item.reason = "refused", str(error)
        left_s = (time.monotonic() - started) / number * (len(todo) - number)
        logger.info(
            "%d/%d %s: %s%s", number, len(todo), item.name, item.status, f", about {left_s:.0f} s left" if left_s else ""
        )
        write_table(arguments.out / TABLE, inputs)
    write_table(arguments.out / TABLE, inputs)
    console.print(end_table(inputs))
    counts = Counter(item.status for item in inputs)
    for status in ("skipped", "refused"):
        for item in [one for one in inputs if one.status == status][:20]:
            sys.stdout.write(f"{status}: {item.name}: {item.reason}\n")
    summary = ", ".join(f"{counts[status]} {status}" for status in ("predicted", "skipped", "refused"))
    sys.stdout.write(f"{summary}; every input is in {arguments.out / TABLE}\n")
    if counts["refused"]:
        raise MedDINOError(f"{counts['refused']} volumes were refused; see {arguments.out / TABLE}")
    done.forget()


class Done:
    """What an interrupted command has predicted: with the same networks, of inputs that have not changed since.

    Args:
        out: Folder of the label maps.
        identity: Of networks, format and version; under another one nothing counts.
    """

    def __init__(self, out: Path, identity: str) -> None:
        self._out, self._path, self._identity = out, out / DONE, identity
        self._known: dict[str, dict[str, Any]] = {}
        with suppress(FileNotFoundError, ValueError):  # there is none, or a damaged one: all is predicted
            content = json.loads(self._path.read_bytes())
            self._known = content["done"] if content["identity"] == identity else {}

    def take(self, item: Input) -> bool:
        """Take over what was predicted of an input; False where it has to be predicted."""
        found = self._known.get(_state(item))
        if found is None or not (self._out / found["output"]).is_file():
            return False
        item.status, item.output, item.notes = "predicted", found["output"], found["notes"]
        item.picture, item.measured = found["picture"], found["measured"]
        return True

    def add(self, item: Input) -> None:
        """Note that an input is predicted."""
        facts = {"output": item.output, "notes": item.notes, "picture": item.picture, "measured": item.measured}
        self._known[_state(item)] = facts
        write_json(self._path, {"identity": self._identity, "done": self._known})

    def forget(self) -> None:
        """Let the same command predict anew: nothing is left to be done."""
        self._path.unlink(missing_ok=True)


def _state(item: Input) -> str:
    """Return a hash of an input's name and of its files as they stand now; it names nobody."""
    files = [(str(path), (archive_of(path) or path).stat()) for path in item.files]
    parts = [item.name, [[name, status.st_size, status.st_mtime_ns] for name, status in files]]
    return hashlib.sha256(canonical_json(parts).encode("utf-8", "surrogateescape")).hexdigest()


def numbers(words: Sequence[str], option: str) -> list[int] | None:
    """Return whole numbers, or None for "all".

    Raises:
        ConfigError: A word is neither.
    """
    if list(words) == [ALL]:
        return None
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"{option} {' '.join(words)}: write whole numbers, or {ALL}")
    return [int(word) for word in words]


def skip_other_modalities(inputs: Sequence[Input], modality: Modality) -> None:
    """Leave out DICOM series of another modality than the networks read: a study holds several.

    Raises:
        ConfigError: There are only such.
    """
    member = MEMBERS[modality]
    wanted = None if member.units == "brightness" else member.dicom_codes[0]
    for item in inputs:
        found = item.series.stack.modality if item.series is not None and item.series.stack is not None else ""
        if wanted is not None and found and found != wanted and not item.status:
            item.status, item.reason = "skipped", f"it is {found}, and the networks read {wanted}"
    others = [item for item in inputs if item.reason.endswith(f"the networks read {wanted}")]
    if others and all(item.status for item in inputs):
        raise ConfigError(f"no {wanted} among the input: {', '.join(f'{item.name}: {item.reason}' for item in others[:5])}")


def end_table(inputs: Sequence[Input]) -> Table:
    """Return what was found in each volume, for the screen: with a column a label, few of them would be too wide for it.

    Labels stand in the colours that they have in the pictures.
    """
    table = Table("input", "status", "found, or why not")
    for item in inputs:
        if item.status != "skipped":
            colours = label_colours(tuple(item.measured))
            found = [
                Text(f"{label} {value}", style="rgb({:.0f},{:.0f},{:.0f})".format(*colours[label]))
                for label, value in item.measured.items()
            ]
            said = Text(item.reason) if item.reason else Text("; ").join([*found, *map(Text, filter(None, (item.notes,)))])
            table.add_row(Text(item.name), Text(item.status), said)
    return table


def outputs_of(item: Input, out: Path, kind: str, flat: bool) -> tuple[Path, Path]:
    """Return where the label map and the overlay of an input are written."""
    ending = ".dcm" if kind == "dicomseg" else ".png" if flat else ".nii.gz"
    return out / f"{item.name}{ending}", out / f"{item.name}_overlay.png"


def check_outputs(inputs: Sequence[Input], out: Path, kind: str, flat: bool) -> None:
    """Refuse to write over what was given, or over files in a folder that this command has not written to before.

    Raises:
        ConfigError: Names the file that would be lost.
    """
    outputs = [path for item in inputs if not item.status for path in outputs_of(item, out, kind, flat)]
    refuse_overwriting(inputs, outputs)
    if not any((out / name).exists() for name in (TABLE, DONE)):
        for path in outputs:
            if path.exists():
                raise ConfigError(
                    f"--out: {path} is there already, and no {TABLE} says that predict wrote it; name another folder"
                )


def predict_one(item: Input, bundle: Bundle, out: Path, kind: str) -> None:
    """Predict one volume or picture and write its label map and its overlay; both stand in the input below `out`.

    Raises:
        VolumeError: It is unreadable, has another number of channels, or is no DICOM series where one is needed.
    """
    if kind == "dicomseg" and item.series is None:
        raise VolumeError(f"{item.name}: a DICOM-SEG refers to the slices of a DICOM series, and this is none")
    volumes = item.read(bundle.channels if bundle.flat else 0)
    item.notes = "; ".join(sorted({note for volume in volumes for note in volume.notes}))
    geometry = volumes[0].geometry
    labels, case = bundle.predict(item.name, np.stack([volume.voxels for volume in volumes]), geometry)
    path, picture = outputs_of(item, out, kind, bundle.flat)
    if kind == "dicomseg" and item.series is not None:
        from meddino.volumes.dicom.segmentation import write_dicom_seg

        masks = {name: bundle.labels.mask(labels, number) for number, name in enumerate(bundle.labels.names)}
        files = item.series.files_of_slices()
        if len(set(files)) != len(labels):
            raise VolumeError(f"{item.name}: a DICOM-SEG needs one readable file a slice")
        write_dicom_seg(path, masks, files, meddino.__version__)
    elif bundle.flat:
        write_mask_picture(path, labels[0])
    else:
        write_label_map(path, labels, geometry)
    with atomic_write(picture) as stream:
        stream.write(mask_overlay_png(case, labels, bundle.labels))
    item.output, item.picture = (str(one.relative_to(out)) for one in (path, picture))
    voxel_ml = float(np.prod(geometry.spacing_mm)) / 1000
    for number, name in enumerate(bundle.labels.names):
        voxels = int(np.count_nonzero(bundle.labels.mask(labels, number)))
        item.measured[name] = f"{voxels} px" if bundle.flat else f"{voxels * voxel_ml:.4g} ml"
