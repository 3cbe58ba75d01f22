"""What a curation can be told. Every field says its unit and where its default comes from."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from meddino.core.config import StrictConfig
from meddino.core.errors import ConfigError
from meddino.data.intensity import MEMBERS, Modality
from meddino.data.sample import Codec
from meddino.volumes.limits import ReadLimits
from meddino_data_curation.sources.licences import NOT_STATED

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_distinct(names: Sequence[str], what: str, advice: str = "give each its own name") -> None:
    """Refuse two things of one name.

    Args:
        names: Of all.
        what: They are, in the plural.
        advice: How to mend it.

    Raises:
        ConfigError: A name comes twice.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two {what} are called '{twice[0]}'; {advice}")


def common_modality(modalities: Iterable[Modality | Literal["auto"]]) -> Modality | Literal["auto"]:
    """Return what held-out data is taken for: what all sources are; by each file's own word where they differ."""
    found = set(modalities)
    return found.pop() if len(found) == 1 else "auto" if found else "ct"


def _with_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"no regular expression ({error})") from error
    if pattern and groups < 1:
        raise ValueError("needs one group in parentheses")
    return pattern


class SourceConfig(StrictConfig):
    """One set of volumes."""

    name: str
    """Stands in manifests and reports: never a patient's name."""
    path: Path
    """A folder, or one file."""
    licence: str | None = None
    """SPDX name or words; what is not known to allow use needs licences.allow; null: own data, none named."""
    citation: str = ""
    """Shown in the report."""
    modality: Modality | Literal["auto"] = "ct"
    """What the values mean: ct (Hounsfield units), mr, image, or auto: what each file says. Another one is refused."""
    preference: int = 0
    """Of duplicates, the one from the set with the lowest number is kept."""
    patient_pattern: str = ""
    """Regex on a path inside the source; first group is the patient, if no header says it; empty: its name."""
    same_ids: bool = False
    """For held-out data: its patient ids mean the same in every source, however short ('P7', 'case_12')."""
    include: str = "**/*"
    """Glob on the path inside the source ({a,b} and [0-9] too); only files that match are read."""

    @property
    def licence_text(self) -> str:
        """What manifests and reports say of the licence."""
        return NOT_STATED if self.licence is None else self.licence

    @property
    def takes_pictures(self) -> bool:
        """Whether picture files are read: brightness is all that they hold."""
        return self.modality == "auto" or MEMBERS[self.modality].units == "brightness"

    @field_validator("name")
    @classmethod
    def _is_plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("use up to 64 letters, digits, dots, dashes and underscores")
        return name

    @field_validator("patient_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        return _with_group(pattern)


class HounsfieldConfig(StrictConfig):
    """Is it CT in Hounsfield units?"""

    check: bool = True
    """False takes every image as it is; ours."""
    repair_stored_values: bool = True
    """Subtract 1024 where air lies at 0 and water at 1024 (rescale was lost); ours."""


class OrientationConfig(StrictConfig):
    """How volumes are turned to Superior, Posterior, Left."""

    max_tilt_deg: float = Field(35.0, ge=0, lt=45)
    """[degree] up to here axes are only permuted and flipped, beyond resampled; ours."""


class SlicesConfig(StrictConfig):
    """Which slices are kept. The paper's own rules are published nowhere: these are ours."""

    min_per_volume: int = Field(1, ge=1)
    """[slices] volumes with fewer are refused."""
    min_body_fraction: float = Field(0.02, ge=0, le=1)
    """Share of pixels inside the body; less is a blank slice."""
    min_contrast: float = Field(0.02, ge=0, le=1)
    """Of MR and pictures: 99th minus 1st percentile [share of the volume's range]; less is a constant slice; ours."""
    min_contrast_hu: float = Field(50.0, ge=0)
    """[HU] 99th minus 1st percentile; less is a constant slice."""
    max_padding_fraction: float = Field(0.5, gt=0, le=1)
    """Share of whole rows or columns without data; more is a truncated slice."""
    z_stride_mm: float = Field(0.0, ge=0)
    """[mm] least distance between kept slices; 0 keeps all."""
    min_size_px: int = Field(40, ge=1)
    """[px] shorter side; smaller slices are refused."""
    max_size_px: int = Field(2048, ge=1, le=16384)
    """[px] longer side; larger slices are refused."""
    min_pixel_mm: float = Field(0.09, gt=0)
    """[mm] shorter pixel side; less is no clinical CT (a 50 mm field at 512 px has 0.098), or metres; ours."""
    max_pixel_mm: float = Field(10.0, gt=0)
    """[mm] longer pixel side; more shows nothing (an 800 mm field at 80 px has 10); ours."""
    max_aspect: float = Field(4.0, ge=1)
    """Longer over shorter side in mm; more is refused."""
    max_pixel_aspect: float = Field(3.0, ge=1)
    """Longer over shorter pixel side; more is refused."""
    remove_table: bool = False
    """Set everything away from the body to air (-1000 HU)."""


class InplaneConfig(StrictConfig):
    """Resampling inside the slice. The paper resamples to 0.45 mm, then to 256 px: preset `ct3m_paper`."""

    spacing_mm: float | None = Field(None, gt=0)
    """[mm] both directions; null keeps the scanner's."""
    size_px: int | None = Field(None, ge=16, le=4096)
    """[px] square, after spacing_mm; null keeps the size."""


class DuplicatesConfig(StrictConfig):
    """Volumes that come more than once."""

    exact: bool = True
    """Find volumes with the same voxels, whatever their files look like."""
    near: bool = True
    """Find resampled, cropped, flipped, noised, windowed copies and other kernels."""


class ShardsConfig(StrictConfig):
    """How the corpus lies on disk."""

    codec: Codec = "blosc2"
    """blosc2 (zstd + bitshuffle) or png16; measured: Blosc2 decodes 9-13 times faster."""
    level: int = Field(5, ge=1, le=9)
    """Compression level; 5: measured optimum of size and speed."""
    size_mib: float = Field(256.0, gt=0)
    """[MiB] a shard is closed once it is this large; volumes stay whole."""


class PrivacyConfig(StrictConfig):
    """What ties ids to patients lies outside the corpus."""

    salt_file: Path | None = None
    """Text that salts the ids; null: <corpus>.private/salt, made at random where it is missing."""


class LimitsConfig(ReadLimits):
    """What a file may ask of the machine. All ours."""

    max_rejected_fraction: float = Field(0.8, ge=0, le=1)
    """Share of refused volumes at which a run stops; 1 never stops."""
    rejected_fraction_after: int = Field(50, ge=1)
    """[volumes] the share is first looked at after so many."""


class LicencesConfig(StrictConfig):
    """Licences that need a decision."""

    allow: tuple[str, ...] = ()
    """Licences that forbid commercial use or are unclear and may be used all the same."""


class ExclusionConfig(StrictConfig):
    """How `exclude` is understood, and what may be missing of it. All ours."""

    patient_pattern: str = ""
    """Regex on a path inside the folders under `exclude`; its first group is the patient."""
    same_ids: bool = False
    """Patient ids there mean the same in every source, however short ('P7', 'case_12')."""
    allow_unread: bool = False
    """Go on although held-out volumes cannot be read, so that scans of them may come in."""
    allow_unmatched_lists: bool = False
    """Go on although a list names nothing in the sources: it is meant for other ones."""

    @field_validator("patient_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        return _with_group(pattern)


class CurationConfig(StrictConfig):
    """A whole curation."""

    sources: tuple[SourceConfig, ...] = ()
    """Sets of volumes; those named on the command line come first."""
    exclude: tuple[Path, ...] = ()
    """Held-out data: folders of volumes, corpora, or text files with an id or path a line."""
    held_out: tuple[SourceConfig, ...] = ()
    """Held-out sets with a name; what `meddino-curate plan` writes."""
    exclusion: ExclusionConfig = ExclusionConfig()
    workers: int | None = Field(None, ge=1)
    """Processes; null: one for each core this process may use."""
    hounsfield: HounsfieldConfig = HounsfieldConfig()
    orientation: OrientationConfig = OrientationConfig()
    slices: SlicesConfig = SlicesConfig()
    inplane: InplaneConfig = InplaneConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    shards: ShardsConfig = ShardsConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    limits: LimitsConfig = LimitsConfig()
    licences: LicencesConfig = LicencesConfig()

    def public(self) -> dict[str, object]:
        """Return the config as it may stand in a corpus: without paths and without what only the machine decides."""
        hidden = {"workers", "privacy", "exclude", "held_out", "exclusion"}
        values = self.model_dump(mode="json", exclude=hidden)
        for source in values["sources"]:
            source.pop("path")
            source.pop("patient_pattern")  # a pattern may quote a name
            source.pop("same_ids")
            source.pop("include")
        return values
