"""Held-out data: lists of ids or paths, and folders of volumes whose scans must not come in."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meddino.core.errors import ConfigError
from meddino.core.files import write_text
from meddino.core.logging import get_logger
from meddino_data_curation.config import CurationConfig, SourceConfig, check_distinct, common_modality
from meddino_data_curation.held_out.exclusion_lists import (
    LIST_SUFFIXES,
    ExclusionList,
    ListOutcome,
    count_existing,
    match_lists,
    read_list,
    unmatched_text,
)
from meddino_data_curation.privacy import Salt, make_private, private_folder
from meddino_data_curation.sources.candidates import Candidate, find_files

UNMATCHED = "unmatched_lines.txt"
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Exclusions:
    """What must not come in.

    Attributes:
        lists: Of patient ids, series and study UIDs, volume ids, paths or file names.
        data: Folders and files of held-out volumes.
        digest: Differs when anything of it has changed.
    """

    lists: tuple[ExclusionList, ...]
    data: tuple[SourceConfig, ...]
    digest: str


@dataclass(frozen=True)
class ExclusionMatch:
    """What lists named.

    Attributes:
        volumes: Ids of the volumes.
        outcomes: One a list.
    """

    volumes: frozenset[str] = frozenset()
    outcomes: tuple[ListOutcome, ...] = ()

    @property
    def digest(self) -> str:
        """Differs when lists name other volumes: paths in them may count from the working folder."""
        return hashlib.sha256("\n".join(sorted(self.volumes)).encode()).hexdigest() if self.volumes else ""


def read_exclusions(config: CurationConfig) -> Exclusions:
    """Sort held-out things into lists and data.

    Args:
        config: Its `exclude` and `held_out`.

    Raises:
        ConfigError: One does not exist, a list is no text, or two have one name.
    """
    lists: list[ExclusionList] = []
    data: list[SourceConfig] = []
    how = config.exclusion
    for path in config.exclude:
        if not path.exists():
            raise ConfigError(f"--exclude {path}: no such file or folder")
        if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
            lists.append(read_list(path, f"list-{len(lists) + 1}"))
        else:
            name = f"excluded-{len(data) + 1}"
            modality = common_modality(source.modality for source in config.sources)
            pattern = how.patient_pattern
            data.append(SourceConfig(name=name, path=path, modality=modality, patient_pattern=pattern, same_ids=how.same_ids))
    data += config.held_out
    check_distinct([source.name for source in data], "held-out sets")
    digest = hashlib.sha256()
    for source in data:
        digest.update(source.model_dump_json().encode("utf-8", "surrogateescape"))
        for file in find_files(source):
            digest.update(f"{file.modified}\n".encode("utf-8", "surrogateescape"))
    for item in lists:
        digest.update("\n".join([item.name, *item.lines, ""]).encode("utf-8", "surrogateescape"))
    return Exclusions(tuple(lists), tuple(data), digest.hexdigest())


def apply_lists(
    candidates: Sequence[Candidate], exclusions: Exclusions, config: CurationConfig, salt: Salt, corpus: Path
) -> ExclusionMatch:
    """Find the volumes that lists name, and say how many lines name none.

    Args:
        candidates: All of all sources.
        exclusions: From `read_exclusions`.
        config: The curation.
        salt: Of the corpus.
        corpus: Its private folder gets the lines that name nothing: they may be names of patients.

    Raises:
        ConfigError: A list names nothing at all, and the config does not allow it.
    """
    volumes, outcomes = match_lists(exclusions.lists, candidates, config.sources, salt)
    paths = {item.name: item.path for item in exclusions.lists}
    where = private_folder(corpus) / UNMATCHED
    if any(outcome.unmatched for outcome in outcomes):
        make_private(where.parent)
        write_text(where, unmatched_text(outcomes, paths))
        where.chmod(0o600)
    else:
        where.unlink(missing_ok=True)
    for outcome in outcomes:
        _tell(outcome, where)
        if not outcome.entry["matched"] and not config.exclusion.allow_unmatched_lists:
            lines = outcome.entry["lines"]
            what = (
                f"none of its {lines} lines matches anything in the sources (they are in {where})" if lines else "it is empty"
            )
            raise ConfigError(
                f"--exclude {paths[outcome.name]}: {what}; a line is a patient id, a series or study UID, or a path, with or "
                "without the source in front; if the list is meant for other sources: exclusion.allow_unmatched_lists=true"
            )
    return ExclusionMatch(frozenset(volumes), tuple(outcomes))


def _tell(outcome: ListOutcome, where: Path) -> None:
    lines, matched = outcome.entry["lines"], outcome.entry["matched"]
    told = f"{matched} of {lines} lines match, {outcome.entry['volumes']} volumes are left out for them"
    if not outcome.unmatched:
        _logger.info("exclusion %s: %s", outcome.name, told)
        return
    elsewhere = count_existing(outcome)
    hint = f"; {elsewhere} of them are files or folders outside the sources: give those to --exclude" if elsewhere else ""
    _logger.warning(
        "exclusion %s: %s; %d lines match NOTHING in the sources, so nothing is left out for them: see %s%s",
        outcome.name, told, len(outcome.unmatched), where, hint,
    )  # fmt: skip
