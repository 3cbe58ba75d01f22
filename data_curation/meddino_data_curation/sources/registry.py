"""Registries of public sets: what each is, where it is to be had, what may be done with it, and how its files lie."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig, load_config, shipped_configs
from meddino.core.errors import ConfigError
from meddino.data.intensity import Modality
from meddino_data_curation.sources.licences import needs_decision

SHIPPED_REGISTRY = "ct3m"  # lvm_med lies beside it
LicenceKind = Literal["permissive", "non-commercial", "unclear"]


class LicenceEntry(StrictConfig):
    """What may be done with a set."""

    id: str
    """SPDX id, or LicenseRef-... where there is none; the name for licences.allow."""
    kind: LicenceKind
    """The last two need a decision: licences.allow."""
    basis: str
    """Where it stands, and what contradicts it."""

    @model_validator(mode="after")
    def _is_told_apart_by_its_name(self) -> "LicenceEntry":
        # A source carries only the id: build's own check must come to the same answer from it.
        if needs_decision(self.id) != (self.kind != "permissive"):
            raise ValueError(f"licence id '{self.id}' does not say that it is {self.kind}")
        return self


class PartEntry(StrictConfig):
    """Some volumes of a set that belong together."""

    name: str
    """train, val, test, ..."""
    files: str
    """Glob below the set's folder; **/, *, ?, [0-9] and {a,b} mean what shells mean."""
    volume_is: Literal["file", "folder"]
    """folder: all matching files of a folder are one volume."""
    volumes: int | None = Field(ge=1)
    """How many there should be; null: not known."""
    held_out: bool
    """The set's own test data: kept out of a corpus unless asked for."""


class HeldOutTable(StrictConfig):
    """A table among the set's files that names its test volumes."""

    file: str
    """Glob below the set's folder."""
    separator: str = Field(min_length=1, max_length=1)
    """Between columns."""
    id_column: str
    """Column with the volume's id."""
    split_column: str
    """Column that says train or test."""
    held_out_value: str
    """What that column says of test volumes."""
    volume: str
    """Glob of a volume below the set's folder; {id} is filled in."""


class SetEntry(StrictConfig):
    """One public set."""

    name: str
    """Stands in manifests."""
    title: str
    """In words."""
    citation: str
    """What to cite."""
    doi: tuple[str, ...]
    """Of the data, then of the article."""
    licence: LicenceEntry
    url: str
    """Where it is to be had."""
    access: Literal["open", "registration", "on request"]
    """What it takes to get it."""
    folders: tuple[str, ...] = Field(min_length=1)
    """Globs of folder names that hold the set; upper or lower case is one."""
    modality: Modality | Literal["auto"] = "ct"
    """What its values mean; auto: what each file says."""
    listed: int | None = Field(None, ge=1)
    """Images or volumes that the paper's table names; null: it names none."""
    used: str = ""
    """What the paper trained on, in words."""
    tasks: tuple[str, ...] = ()
    """Tasks of `meddino-eval` whose test data it may hold: audit a corpus with it against each."""
    parts: tuple[PartEntry, ...] = Field(min_length=1)
    """Its volumes."""
    held_out_table: HeldOutTable | None
    """Null where folders or file names tell, or nothing."""
    held_out_rule: str
    """Which volumes are test data, in words."""
    patient_pattern: str
    """Regex; its first group is the patient; empty: the file's name."""
    preference: int = Field(ge=0)
    """Of duplicates, the one from the set with the lowest number is kept."""
    verified: tuple[Literal["citation", "licence"], ...] | None = None
    """What was compared with the set's own page or article when this was written; null: not recorded."""
    repackages: tuple[str, ...]
    """Sets of this registry whose scans come again in it."""
    not_known: tuple[str, ...]
    """What could not be found out."""

    @property
    def volumes(self) -> int:
        """How many volumes the set should have, where that is known."""
        return sum(part.volumes or 0 for part in self.parts)

    @property
    def caveat(self) -> str:
        """What of citation and licence was not compared with the set's own page, in words; "" where all was."""
        open_ones = [] if self.verified is None else [what for what in ("citation", "licence") if what not in self.verified]
        return f"{' and '.join(open_ones)} not verified here" if open_ones else ""

    @property
    def full_citation(self) -> str:
        """The citation with its DOIs."""
        return " ".join([self.citation, *(f"doi:{doi}" for doi in self.doi)])


def load_registry(folder: Path | None = None) -> list[SetEntry]:
    """Read a registry, one YAML file a set.

    Args:
        folder: With the YAML files, or the name of a shipped one: ct3m (the 17 sets of CT-3M, which None means) or lvm_med
            (LVM-Med's 55).

    Returns:
        The sets, sorted by name.

    Raises:
        ConfigError: A file is wrong, there is none, or a set repackages one that is not in the registry.
    """
    shipped = shipped_configs() / "data_curation" / (folder or SHIPPED_REGISTRY)
    where = shipped if folder is None or not folder.exists() else folder
    files = sorted(where.glob("*.yaml"))
    if not files:
        raise ConfigError(f"no registry in {where}: no YAML file there")
    entries = [load_config(SetEntry, [file]) for file in files]
    names = [entry.name for entry in entries]
    for file, entry in zip(files, entries, strict=True):
        if entry.name != file.stem:
            raise ConfigError(f"{file}: name is '{entry.name}'; it must be the file's name, '{file.stem}'")
        unknown = set(entry.repackages) - set(names)
        if unknown:
            raise ConfigError(f"{file}: repackages names '{min(unknown)}', which is not in the registry")
    return entries
