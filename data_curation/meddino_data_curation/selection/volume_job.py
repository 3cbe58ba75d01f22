"""One volume from its files to a piece of a shard: read, check, turn, choose slices, encode. Runs in a worker process."""

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import VolumeError
from meddino.core.files import atomic_write
from meddino.data.content import ContentHash, slice_hash
from meddino.data.intensity import Modality
from meddino.data.sample import encode_slice
from meddino.volumes.dicom.pixels import read_dicom_volume
from meddino.volumes.itk_files import read_volume_file
from meddino.volumes.orientation import OUTSIDE_HU, to_axial_lps
from meddino.volumes.volume import AxialVolume
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.corpus.thumbnails import SLICE_THUMBNAIL_PX, refused_thumbnail, slice_thumbnail
from meddino_data_curation.corpus.work_folder import VolumeRecord, WorkFolder
from meddino_data_curation.selection.fingerprint import Fingerprint, chosen_slices, slice_vector
from meddino_data_curation.selection.hounsfield import recognise_hounsfield
from meddino_data_curation.selection.inplane import resample_slice
from meddino_data_curation.selection.slice_choice import (
    body_mask,
    refusal,
    size_refusal,
    slice_statistics,
    sorted_sample,
    strided,
)
from meddino_data_curation.selection.table_removal import without_table
from meddino_data_curation.sources.candidates import Candidate
from meddino_data_curation.sources.dicom_series import DicomCandidate

NO_MEMORY = "not enough memory to read it; fewer `workers` leave more for each, limits.max_volume_voxels refuses it at once"
HISTOGRAM_EDGES_HU = tuple(range(-1100, 1601, 50))
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class VolumeJob:
    """What a worker needs to know of one volume.

    Attributes:
        candidate: The files.
        job: Hash of everything that decides the result.
        dataset: Name of its source.
        licence: Of its source.
        modality: Of its source.
        scan_only: True if only content and fingerprint are wanted, no slices.
    """

    candidate: Candidate
    job: str
    dataset: str
    licence: str
    modality: Modality = "ct"
    scan_only: bool = False


def curate_volume(job: VolumeJob, config: CurationConfig, work: WorkFolder) -> str:
    """Do one volume and leave its record in the work folder.

    Returns:
        The volume's status: "accepted" or "rejected".

    Raises:
        OSError: The work folder cannot be written (a full disk); nothing is recorded then.
    """
    row = _empty_row(job)
    curation = _Curation(job, config, work, row)
    try:
        if job.candidate.problem:
            raise VolumeError(job.candidate.problem)
        record = curation.run()
    except VolumeError as error:
        _reject(row, str(error), work)
        record = VolumeRecord(job.job, row, thumbnail=curation.thumbnail(), refused=curation.refused)
    except MemoryError:  # NumPy's own is one of these
        _reject(row, NO_MEMORY, work)
        record = VolumeRecord(job.job, row)
    work.write_record(record)
    return str(record.row["status"])


def _reject(row: dict[str, Any], reason: str, work: WorkFolder) -> None:
    row.update(status="rejected", reason=reason, num_slices_kept=0)
    work.piece(row["volume_id"]).unlink(missing_ok=True)


def record_crash(job: VolumeJob, work: WorkFolder) -> None:
    """Record a volume whose reading ended the process."""
    row = _empty_row(job)
    _reject(row, "reading it ended the process (not enough memory, or a fault in a decoder)", work)
    work.write_record(VolumeRecord(job.job, row))


def _empty_row(job: VolumeJob) -> dict[str, Any]:
    candidate = job.candidate
    return {
        "volume_id": candidate.volume_id,
        "dataset": job.dataset,
        "modality": job.modality,
        "status": "accepted",
        "reason": None,
        "duplicate_of": None,
        "duplicate_kind": None,
        "patient_key": candidate.patient_key,
        "study_key": candidate.study_key,
        "series_key": candidate.series_key,
        "content_hash": None,
        "shape": None,
        "spacing_mm": None,
        "num_slices_kept": 0,
        "slices_left_out": {},
        "licence": job.licence,
        "format": candidate.format,
        "tilt_deg": None,
        "notes": "; ".join(candidate.notes) or None,
    }


class _Curation:
    """The steps of one volume; holds the volume once and one slice at a time."""

    def __init__(self, job: VolumeJob, config: CurationConfig, work: WorkFolder, row: dict[str, Any]) -> None:
        self.job, self.config, self.work, self.row = job, config, work, row
        self.offset = 0
        self.left_out: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        self.not_hu = ""
        self.pixel_mm = (1.0, 1.0)
        self.slices: dict[str, list[Any]] = {}
        self.histogram = np.zeros(len(HISTOGRAM_EDGES_HU) - 1, dtype=np.int64)
        self.middle: NDArray[np.int16] | None = None
        self.looks: list[tuple[float, NDArray[np.int8]]] = []

    def run(self) -> VolumeRecord:
        """Read, write the piece, return the record."""
        volume = self._read()
        shape, spacing = volume.geometry.shape, volume.geometry.spacing_mm
        self.row.update(shape=list(shape), spacing_mm=list(spacing), notes="; ".join(volume.notes) or None)
        if self.job.scan_only:
            for _ in self._look(volume):
                pass
            return VolumeRecord(self.job.job, self.row, fingerprint=self._fingerprint())
        problem = size_refusal(shape[1:], spacing[1:], self.config.slices, self.config.inplane)
        if problem:
            raise VolumeError(problem)
        if shape[0] < self.config.slices.min_per_volume:
            raise VolumeError(f"{shape[0]} slices; slices.min_per_volume is {self.config.slices.min_per_volume}")
        path = self.work.piece(self.row["volume_id"])
        with atomic_write(path) as stream:
            self._write_slices(volume, stream)
            length = stream.tell()
        self.row["slices_left_out"] = dict(sorted(self.left_out.items()))
        kept = len(self.slices.get("key", ()))
        if kept < self.config.slices.min_per_volume:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
            raise VolumeError(
                f"{kept} of {shape[0]} slices are of use ({counts}); at least {self.config.slices.min_per_volume} wanted"
            )
        self.row["num_slices_kept"] = kept
        return VolumeRecord(
            self.job.job,
            self.row,
            self.slices,
            length,
            self._fingerprint(),
            self.thumbnail(),
            self.histogram.tolist(),
            self.refused,
        )

    def thumbnail(self) -> str:
        """Return the middle slice as far as it was seen."""
        return slice_thumbnail(self.middle, self.pixel_mm) if self.middle is not None else self.not_hu

    def _read(self) -> AxialVolume:
        candidate, config = self.job.candidate, self.config
        if isinstance(candidate, DicomCandidate) and candidate.stack is not None:
            volume = read_dicom_volume(candidate.stack, config.limits)
        else:
            volume = read_volume_file(candidate.files[0], candidate.format, config.limits)
        if self.job.modality != "ct":
            raise VolumeError(f"modality {self.job.modality}: no rules for it")
        try:
            verdict = recognise_hounsfield(volume.voxels, config.hounsfield)
        except VolumeError:
            self.not_hu = "" if self.job.scan_only else refused_thumbnail(volume)
            raise
        self.offset = verdict.offset
        if verdict.note:
            volume = replace(volume, notes=(*volume.notes, verdict.note))
        axial, tilt_deg = to_axial_lps(
            volume, config.orientation.max_tilt_deg, OUTSIDE_HU - self.offset, config.limits.max_volume_voxels
        )
        self.row["tilt_deg"] = round(tilt_deg, 3)
        self.pixel_mm = axial.geometry.spacing_mm[1:]
        return axial

    def _write_slices(self, volume: AxialVolume, stream: IO[bytes]) -> None:
        places = [volume.place_mm(z) for z in range(volume.geometry.shape[0])]
        wanted = strided(places, self.config.slices.z_stride_mm)
        for z, hu in self._look(volume):
            if z not in wanted:
                self.left_out["closer than z_stride_mm"] += 1
                continue
            self._write_slice(hu, z, places[z], volume, stream)

    def _look(self, volume: AxialVolume) -> Iterator[tuple[int, NDArray[np.int16]]]:
        """Go through all slices in HU, on the way hashing them and noting what they look like."""
        count = volume.geometry.shape[0]
        _, y_mm, x_mm = volume.geometry.spacing_mm
        looked_at = set(chosen_slices(count).tolist()) if self.config.duplicates.near else set()
        content = ContentHash(volume.geometry.shape)
        for z in range(count):
            hu = to_int16(volume.planes[z], self.offset)
            content.add(hu)
            if z == count // 2:
                self.middle = hu
            if z in looked_at and (vector := slice_vector(hu, (y_mm, x_mm))) is not None:
                self.looks.append((volume.place_mm(z), vector))
            yield z, hu
        self.row["content_hash"] = content.hexdigest()

    def _fingerprint(self) -> dict[str, Any] | None:
        if not self.looks:
            return None
        places, vectors = zip(*self.looks, strict=True)
        return Fingerprint(np.array(places), np.stack(vectors)).to_json()

    def _write_slice(self, hu: NDArray[np.int16], z: int, z_mm: float, volume: AxialVolume, stream: IO[bytes]) -> None:
        statistics, sample = slice_statistics(hu)
        problem = refusal(statistics, self.config.slices)
        if problem:
            self.left_out[problem] += 1
            if problem not in self.refused:
                self.refused[problem] = slice_thumbnail(hu, self.pixel_mm, SLICE_THUMBNAIL_PX)
            return
        if self.config.slices.remove_table:
            hu = without_table(hu, body_mask(hu))
            sample = sorted_sample(hu)
        self.histogram += np.diff(np.searchsorted(sample, HISTOGRAM_EDGES_HU))
        thickness, *inplane = volume.geometry.spacing_mm
        hu, spacing = resample_slice(hu, (inplane[0], inplane[1]), self.config.inplane)
        shards = self.config.shards
        data = encode_slice(hu, shards.codec, shards.level)
        stream.write(data)
        values = {
            "key": f"{self.row['volume_id']}-{z:05d}", "z_index": z, "z_mm": round(z_mm, 4),
            "length": len(data), "crc32": zlib.crc32(data), "content_hash": slice_hash(hu), "rows": hu.shape[0],
            "cols": hu.shape[1], "channels": 1, "dtype": str(hu.dtype),
            "spacing_mm": [round(step, 6) for step in spacing], "thickness_mm": round(thickness, 4),
            "value_low": None, "value_high": None, "intensity_p01": statistics.hu_p01, "intensity_p50": statistics.hu_p50,
            "intensity_p99": statistics.hu_p99, "body_fraction": round(statistics.body_fraction, 4),
        }  # fmt: skip
        for name, value in values.items():
            self.slices.setdefault(name, []).append(value)


def to_int16(plane: NDArray[Any], offset: int) -> NDArray[np.int16]:
    """Return one slice as contiguous int16 HU: rounded to the nearest, clipped to what int16 holds.

    Args:
        plane: [rows, cols], any real type.
        offset: Added before rounding.
    """
    if plane.dtype == np.int16 and offset == 0:
        return np.ascontiguousarray(plane)
    wide = plane.astype(np.float64) + offset
    return np.ascontiguousarray(np.clip(np.rint(wide), _INT16.min, _INT16.max), dtype=np.int16)
