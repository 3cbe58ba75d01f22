"""`meddino-curate explain`: what a file or folder is taken for, which facts decided, and what it would be in a corpus."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from meddino.core.errors import ConfigError
from meddino.volumes.dicom.stacking import DicomStack
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.corpus.work_folder import VolumeRecord, WorkFolder
from meddino_data_curation.privacy import Salt
from meddino_data_curation.selection.volume_job import VolumeJob, curate_volume
from meddino_data_curation.sources.candidates import Candidate
from meddino_data_curation.sources.dicom_series import DicomCandidate
from meddino_data_curation.sources.discovery import Discovery, discover

_MOST = 12  # volumes: a screen


def explain(config: CurationConfig, console: Console) -> None:
    """Print what every volume of a source is taken for. Nothing is written and no patient is named.

    Args:
        config: With the source.
        console: Where to print.

    Raises:
        ConfigError: There is no source.
    """
    if not config.sources:
        raise ConfigError("nothing to explain; name a file or folder")
    found = discover(config.sources, Salt(b"of no corpus"))
    _print_files(found, console)
    usable_first = sorted(found.candidates, key=lambda item: (bool(item.problem), item.source_path))
    for candidate in usable_first[:_MOST]:
        _print_volume(candidate, _curated(candidate, config), config, console)
    if len(usable_first) > _MOST:
        console.print(f"... and {len(usable_first) - _MOST} more; name one of their files or folders", markup=False)


def _curated(candidate: Candidate, config: CurationConfig) -> VolumeRecord | None:
    """Take one volume through everything a build does with it but the search for duplicates, and keep nothing."""
    source = config.sources[candidate.source]
    with tempfile.TemporaryDirectory(prefix="explain-") as folder:
        work = WorkFolder(Path(folder, "corpus"))
        curate_volume(VolumeJob(candidate, "explain", source.name, source.licence_text, source.modality), config, work)
        return work.read_record(candidate.volume_id)


def _print_files(found: Discovery, console: Console) -> None:
    counts = ", ".join(f"{count} x {kind}" for kind, count in found.files.most_common())
    console.print(f"files: {counts or 'none'}", markup=False)
    volumes = sum(not item.problem for item in found.candidates)
    refused = len(found.candidates) - volumes
    console.print(f"volumes: {volumes}" + (f", and {refused} refused unread" if refused else ""), markup=False)


def _print_volume(candidate: Candidate, record: VolumeRecord | None, config: CurationConfig, console: Console) -> None:
    row = record.row if record is not None else {}
    name = (
        candidate.files[0].name if len(candidate.files) == 1 else f"{len(candidate.files)} files, {candidate.files[0].name} ..."
    )
    key = f"#{candidate.key}" if candidate.key else ""
    console.print(f"\n{candidate.format}: {_printable(name + key)}", markup=False)
    lines: list[tuple[str, str]] = []
    if isinstance(candidate, DicomCandidate) and candidate.stack is not None:
        lines += _facts(candidate.stack)
    if row.get("shape"):
        z, y, x = row["spacing_mm"] or (None, None, None)
        spacing = f" of {z:.4g} x {y:.4g} x {x:.4g} mm" if z is not None else " of unknown size"
        lines.append(("upright", f"{' x '.join(map(str, row['shape']))} voxels{spacing}"))
    if row.get("tilt_deg"):
        lines.append(("tilt", f"{row['tilt_deg']:g} degrees; beyond {config.orientation.max_tilt_deg:g} it is resampled"))
    lines += [("note", note) for note in (row.get("notes") or "; ".join(candidate.notes)).split("; ") if note]
    if row.get("status") == "accepted":
        left = ", ".join(f"{count} {reason}" for reason, count in row["slices_left_out"].items())
        kept = f"{row['num_slices_kept']} slices of {row.get('modality') or 'unknown modality'}"
        lines.append(("corpus", f"accepted: {kept}{f'; left out: {left}' if left else ''}"))
    else:
        lines.append(("corpus", f"refused: {row.get('reason') or candidate.problem}"))
    for key, value in lines:
        console.print(f"  {key:9s} {value}", markup=False, soft_wrap=True)


def _facts(stack: DicomStack) -> Sequence[tuple[str, str]]:
    plane = stack.slices[0].plane
    scales = {item.frame.scale for item in stack.slices}
    told = [f"x {scale[0]:g} {scale[1]:+g}" if scale else "none in the header" for scale in sorted(scales, key=str)]
    what = "frames" if len({item.frame.number for item in stack.slices}) > 1 else "slices"
    rows, cols = (" ".join(f"{value:.3g}" for value in vector) for vector in (plane.along_rows, plane.along_cols))
    facts = [
        (
            "grouped",
            f"{len(stack.slices)} {what} of {stack.rows} x {stack.cols} px, {stack.modality}",
        ),
        ("place", f"rows along {rows}, columns along {cols}; pixels of {plane.spacing_mm[0]:g} x {plane.spacing_mm[1]:g} mm"),
        ("rescale", ", ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")),
    ]
    paddings = {item.frame.padding for item in stack.slices} - {None}
    if paddings:
        facts.append(("padding", f"stored value {min(padding[0] for padding in paddings if padding is not None)}"))
    if stack.photometric:
        facts.append(("display", stack.photometric))
    return facts


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
