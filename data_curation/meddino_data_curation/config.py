"""What a curation can be told. Every field says its unit and where its default comes from."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from meddino.core.config import StrictConfig
from meddino.core.errors import ConfigError
from meddino.data.intensity import Modality
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

    name: Annotated[str, Field(description="stands in manifests and reports: never a patient's name")]
    path: Annotated[Path, Field(description="a folder, or one file")]
    licence: Annotated[
        str | None,
        Field(
            description="SPDX name or words; what is not known to allow use needs licences.allow; null: own data, none named"
        ),
    ] = None
    citation: Annotated[str, Field(description="shown in the report")] = ""
    modality: Annotated[Modality, Field(description="what the values mean: ct (Hounsfield units), mr or image")] = "ct"
    preference: Annotated[int, Field(description="of duplicates, the one from the set with the lowest number is kept")] = 0
    patient_pattern: Annotated[
        str,
        Field(
            description="regex on a path inside the source; first group is the patient, if no header says it; empty: its name"
        ),
    ] = ""
    same_ids: Annotated[
        bool,
        Field(description="for held-out data: its patient ids mean the same in every source, however short ('P7', 'case_12')"),
    ] = False
    include: Annotated[
        str, Field(description="glob on the path inside the source ({a,b} and [0-9] too); only files that match are read")
    ] = "**/*"

    @property
    def licence_text(self) -> str:
        """What manifests and reports say of the licence."""
        return NOT_STATED if self.licence is None else self.licence

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

    check: Annotated[bool, Field(description="false takes every image as it is; ours")] = True
    repair_stored_values: Annotated[
        bool, Field(description="subtract 1024 where air lies at 0 and water at 1024 (rescale was lost); ours")
    ] = True


class OrientationConfig(StrictConfig):
    """How volumes are turned to Superior, Posterior, Left."""

    max_tilt_deg: Annotated[
        float, Field(ge=0, lt=45, description="[degree] up to here axes are only permuted and flipped, beyond resampled; ours")
    ] = 35.0


class SlicesConfig(StrictConfig):
    """Which slices are kept. The paper's own rules are published nowhere: these are ours."""

    min_per_volume: Annotated[int, Field(ge=1, description="[slices] volumes with fewer are refused")] = 1
    min_body_fraction: Annotated[
        float, Field(ge=0, le=1, description="share of pixels inside the body; less is a blank slice")
    ] = 0.02
    min_contrast_hu: Annotated[float, Field(ge=0, description="[HU] 99th minus 1st percentile; less is a constant slice")] = (
        50.0
    )
    max_padding_fraction: Annotated[
        float, Field(gt=0, le=1, description="share of whole rows or columns without data; more is a truncated slice")
    ] = 0.5
    z_stride_mm: Annotated[float, Field(ge=0, description="[mm] least distance between kept slices; 0 keeps all")] = 0.0
    min_size_px: Annotated[int, Field(ge=1, description="[px] shorter side; smaller slices are refused")] = 40
    max_size_px: Annotated[int, Field(ge=1, le=16384, description="[px] longer side; larger slices are refused")] = 2048
    min_pixel_mm: Annotated[
        float,
        Field(
            gt=0,
            description="[mm] shorter pixel side; less is no clinical CT (a 50 mm field at 512 px has 0.098), or metres; ours",
        ),
    ] = 0.09
    max_pixel_mm: Annotated[
        float, Field(gt=0, description="[mm] longer pixel side; more shows nothing (an 800 mm field at 80 px has 10); ours")
    ] = 10.0
    max_aspect: Annotated[float, Field(ge=1, description="longer over shorter side in mm; more is refused")] = 4.0
    max_pixel_aspect: Annotated[float, Field(ge=1, description="longer over shorter pixel side; more is refused")] = 3.0
    remove_table: Annotated[bool, Field(description="set everything away from the body to air (-1000 HU)")] = False


class InplaneConfig(StrictConfig):
    """Resampling inside the slice. The paper resamples to 0.45 mm, then to 256 px: preset `ct3m_paper`."""

    spacing_mm: Annotated[float | None, Field(gt=0, description="[mm] both directions; null keeps the scanner's")] = None
    size_px: Annotated[int | None, Field(ge=16, le=4096, description="[px] square, after spacing_mm; null keeps the size")] = (
        None
    )


class DuplicatesConfig(StrictConfig):
    """Volumes that come more than once."""

    exact: Annotated[bool, Field(description="find volumes with the same voxels, whatever their files look like")] = True
    near: Annotated[bool, Field(description="find resampled, cropped, flipped, noised, windowed copies and other kernels")] = (
        True
    )


class ShardsConfig(StrictConfig):
    """How the corpus lies on disk."""

    codec: Annotated[
        Codec, Field(description="blosc2 (zstd + bitshuffle) or png16; DESIGN.md: Blosc2 decodes 9-13 times faster")
    ] = "blosc2"
    level: Annotated[int, Field(ge=1, le=9, description="compression level; 5: measured optimum of size and speed")] = 5
    size_mib: Annotated[float, Field(gt=0, description="[MiB] a shard is closed once it is this large; volumes stay whole")] = (
        256.0
    )


class PrivacyConfig(StrictConfig):
    """What ties ids to patients lies outside the corpus."""

    salt_file: Annotated[
        Path | None,
        Field(description="text that salts the ids; null: <corpus>.private/salt, made at random where it is missing"),
    ] = None


class LimitsConfig(ReadLimits):
    """What a file may ask of the machine. All ours."""

    max_rejected_fraction: Annotated[
        float, Field(ge=0, le=1, description="share of refused volumes at which a run stops; 1 never stops")
    ] = 0.8
    rejected_fraction_after: Annotated[int, Field(ge=1, description="[volumes] the share is first looked at after so many")] = (
        50
    )


class LicencesConfig(StrictConfig):
    """Licences that need a decision."""

    allow: Annotated[
        tuple[str, ...], Field(description="licences that forbid commercial use or are unclear and may be used all the same")
    ] = ()


class ExclusionConfig(StrictConfig):
    """How `exclude` is understood, and what may be missing of it. All ours."""

    patient_pattern: Annotated[
        str, Field(description="regex on a path inside the folders under `exclude`; its first group is the patient")
    ] = ""
    same_ids: Annotated[
        bool, Field(description="patient ids there mean the same in every source, however short ('P7', 'case_12')")
    ] = False
    allow_unread: Annotated[
        bool, Field(description="go on although held-out volumes cannot be read, so that scans of them may come in")
    ] = False
    allow_unmatched_lists: Annotated[
        bool, Field(description="go on although a list names nothing in the sources: it is meant for other ones")
    ] = False

    @field_validator("patient_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        return _with_group(pattern)


class CurationConfig(StrictConfig):
    """A whole curation."""

    sources: Annotated[
        tuple[SourceConfig, ...], Field(description="sets of volumes; those named on the command line come first")
    ] = ()
    exclude: Annotated[
        tuple[Path, ...],
        Field(description="held-out data: folders of volumes, corpora, or text files with an id or path a line"),
    ] = ()
    held_out: Annotated[
        tuple[SourceConfig, ...], Field(description="held-out sets with a name; what `meddino-curate plan` writes")
    ] = ()
    exclusion: ExclusionConfig = ExclusionConfig()
    workers: Annotated[int | None, Field(ge=1, description="processes; null: one for each core this process may use")] = None
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
