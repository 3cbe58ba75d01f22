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
from meddino.data.sample import encode_slice
from meddino.volumes.dicom.pixels import read_dicom_volume
from meddino.volumes.formats.itk import read_volume_file
from meddino.volumes.geometry import Geometry
from meddino.volumes.orientation import AXIAL_LPS, OUTSIDE_HU, to_axial_lps
from meddino.volumes.pictures import PICTURE_ERRORS, as_uint16, lifted, read_picture
from meddino.volumes.volume import AxialVolume
from meddino_data_curation.config import CurationConfig, InplaneConfig
from meddino_data_curation.corpus.thumbnails import SLICE_THUMBNAIL_PX, refused_thumbnail, slice_thumbnail
from meddino_data_curation.corpus.work_folder import VolumeRecord, WorkFolder
from meddino_data_curation.selection.fingerprint import Fingerprint, chosen_slices, picture_vector, slice_vector
from meddino_data_curation.selection.inplane import resample_slice
from meddino_data_curation.selection.modality import PICTURE, Recognised, SourceModality, recognise
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
    modality: SourceModality = "ct"
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
        "position_mm": None,
        "notes": "; ".join(candidate.notes) or None,
    }


class _Curation:
    """The steps of one volume; holds the volume once and one slice at a time."""

    def __init__(self, job: VolumeJob, config: CurationConfig, work: WorkFolder, row: dict[str, Any]) -> None:
        self.job, self.config, self.work, self.row = job, config, work, row
        self.values = Recognised("ct")
        self.has_spacing = True
        self.left_out: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        self.not_recognised = ""
        self.pixel_mm = (1.0, 1.0)
        self.slices: dict[str, list[Any]] = {}
        self.histogram = np.zeros(len(HISTOGRAM_EDGES_HU) - 1, dtype=np.int64)
        self.middle: NDArray[Any] | None = None
        self.looks: list[tuple[float, NDArray[np.int8]]] = []

    def run(self) -> VolumeRecord:
        """Read, write the piece, return the record."""
        volume = self._read()
        shape, spacing = volume.geometry.shape, volume.geometry.spacing_mm
        self.row.update(shape=list(shape), spacing_mm=list(spacing), notes="; ".join(volume.notes) or None)
        self.row["position_mm"] = round(volume.geometry.origin_mm[2], 3)
        if self.job.scan_only:
            for _ in self._look(volume):
                pass
            return VolumeRecord(self.job.job, self.row, fingerprint=self._fingerprint())
        problem = size_refusal(shape[1:], spacing[1:], self.config.slices, self.inplane)
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
        if self.middle is None:
            return self.not_recognised
        return slice_thumbnail(self.values.as_soft_tissue(self.middle), self.pixel_mm)

    @property
    def inplane(self) -> InplaneConfig:
        """How slices are resampled; pixels of unknown size cannot be brought to a spacing."""
        wanted = self.config.inplane
        return wanted if self.has_spacing else wanted.model_copy(update={"spacing_mm": None})

    def _read(self) -> AxialVolume:
        candidate, config = self.job.candidate, self.config
        if candidate.format == PICTURE:
            return self._read_picture(candidate)
        if isinstance(candidate, DicomCandidate) and candidate.stack is not None:
            volume = read_dicom_volume(candidate.stack, config.limits)
        else:
            volume = read_volume_file(candidate.files[0], candidate.format, config.limits)
        try:
            self._recognise(volume.voxels, volume.modality)
        except VolumeError:
            self.not_recognised = "" if self.job.scan_only else refused_thumbnail(volume)
            raise
        if self.values.note:
            volume = replace(volume, notes=(*volume.notes, self.values.note))
        outside = OUTSIDE_HU - self.values.offset if self.values.value_range is None else round(self.values.value_range[0])
        axial, tilt_deg = to_axial_lps(volume, config.orientation.max_tilt_deg, outside, config.limits.max_volume_voxels)
        self.row["tilt_deg"] = round(tilt_deg, 3)
        self.pixel_mm = axial.geometry.spacing_mm[1:]
        return axial

    def _read_picture(self, candidate: Candidate) -> AxialVolume:
        """Return a picture as a volume of one slice, whose pixels are squares of unknown size."""
        path = candidate.files[0]
        try:
            picture = read_picture(path, candidate.key)
        except VolumeError as error:
            words = str(error)
            for name in (f"{path}#{candidate.key}", f"{path}#{candidate.key.partition('#')[0]}", path):
                words = words.replace(f" {name}", "")  # names may be a patient's
            raise VolumeError(words) from error
        except (OSError, *PICTURE_ERRORS) as error:
            raise VolumeError("picture cannot be read: it is truncated or damaged") from error
        values = picture.values
        if values.dtype.kind != "u":
            values = lifted(values) if values.dtype.kind == "f" else as_uint16(values)
        planes = np.moveaxis(values, 1, -1)
        planes = planes[..., 0] if planes.shape[-1] == 1 else planes
        fills_type = picture.value_range is not None and picture.value_range[1] == np.iinfo(planes.dtype).max
        self._recognise(planes, PICTURE if fills_type else picture.modality or PICTURE)
        self.has_spacing = False
        shape = (planes.shape[0], planes.shape[1], planes.shape[2])
        notes = (*candidate.notes, *([picture.note] if picture.note else []))
        return AxialVolume(planes, Geometry(shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), AXIAL_LPS), notes=notes)

    def _recognise(self, voxels: NDArray[Any], code: str) -> None:
        self.values = recognise(voxels, self.job.modality, code, self.config.hounsfield)
        self.row["modality"] = self.values.modality
        stored = self.values.stored(voxels[:1, :1, :1])
        if self.config.shards.codec == "png16" and (stored.dtype != np.int16 or stored.ndim > 3):
            raise VolumeError(f"shards.codec=png16 holds int16 grey values, these are {stored.dtype}; blosc2 holds all")

    def _write_slices(self, volume: AxialVolume, stream: IO[bytes]) -> None:
        places = [volume.place_mm(z) for z in range(volume.geometry.shape[0])]
        wanted = strided(places, self.config.slices.z_stride_mm)
        for z, stored in self._look(volume):
            if z not in wanted:
                self.left_out["closer than z_stride_mm"] += 1
                continue
            self._write_slice(stored, z, places[z], volume, stream)

    def _look(self, volume: AxialVolume) -> Iterator[tuple[int, NDArray[Any]]]:
        """Go through all slices as they are stored, on the way hashing them and noting what they look like."""
        count = volume.geometry.shape[0]
        looked_at = set(chosen_slices(count).tolist()) if self.config.duplicates.near else set()
        content: ContentHash | None = None
        for z in range(count):
            stored = self.values.stored(volume.planes[z])
            if content is None:
                content = ContentHash((count, *stored.shape), str(stored.dtype))
            content.add(stored)
            if z == count // 2:
                self.middle = stored
            if z in looked_at and (vector := self._vector(stored, volume)) is not None:
                self.looks.append((volume.place_mm(z), vector))
            yield z, stored
        self.row["content_hash"] = content.hexdigest() if content else None

    def _vector(self, stored: NDArray[Any], volume: AxialVolume) -> NDArray[np.int8] | None:
        if not self.has_spacing:
            return picture_vector(stored if stored.ndim == 2 else stored.mean(axis=-1))
        _, y_mm, x_mm = volume.geometry.spacing_mm
        return slice_vector(self.values.as_soft_tissue(stored), (y_mm, x_mm))

    def _fingerprint(self) -> dict[str, Any] | None:
        if not self.looks:
            return None
        places, vectors = zip(*self.looks, strict=True)
        return Fingerprint(np.array(places), np.stack(vectors)).to_json()

    def _write_slice(self, stored: NDArray[Any], z: int, z_mm: float, volume: AxialVolume, stream: IO[bytes]) -> None:
        value_range = self.values.value_range
        statistics, sample = slice_statistics(stored, self.values.modality, value_range)
        problem = refusal(statistics, self.config.slices, value_range)
        if problem:
            self.left_out[problem] += 1
            if problem not in self.refused:
                shown = self.values.as_soft_tissue(stored)
                self.refused[problem] = slice_thumbnail(shown, self.pixel_mm, SLICE_THUMBNAIL_PX)
            return
        if self.values.modality == "ct":
            if self.config.slices.remove_table:
                stored = without_table(stored, body_mask(stored))
                sample = sorted_sample(stored)
            self.histogram += np.diff(np.searchsorted(sample, HISTOGRAM_EDGES_HU))
        thickness, *inplane = volume.geometry.spacing_mm
        stored, spacing = resample_slice(stored, (inplane[0], inplane[1]), self.inplane)
        shards = self.config.shards
        data = encode_slice(stored, shards.codec, shards.level)
        stream.write(data)
        low, high = value_range or (None, None)
        values = {
            "key": f"{self.row['volume_id']}-{z:05d}", "z_index": z, "z_mm": round(z_mm, 4) if self.has_spacing else None,
            "length": len(data), "crc32": zlib.crc32(data), "content_hash": slice_hash(stored), "rows": stored.shape[0],
            "cols": stored.shape[1], "channels": 1 if stored.ndim == 2 else stored.shape[2], "dtype": str(stored.dtype),
            "spacing_mm": [round(step, 6) for step in spacing] if self.has_spacing else None,
            "thickness_mm": round(thickness, 4) if self.has_spacing else None,
            "value_low": low, "value_high": high, "intensity_p01": statistics.p01, "intensity_p50": statistics.p50,
            "intensity_p99": statistics.p99, "body_fraction": round(statistics.body_fraction, 4),
        }  # fmt: skip
        for name, value in values.items():
            self.slices.setdefault(name, []).append(value)
