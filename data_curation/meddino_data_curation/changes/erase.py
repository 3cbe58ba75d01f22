"""`meddino-curate erase`: patients and volumes taken out of a finished corpus, everywhere, for good."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meddino.core.errors import ConfigError
from meddino.core.files import write_text
from meddino.core.logging import get_logger
from meddino_data_curation.changes.edition import Edition, read_edition
from meddino_data_curation.changes.lookup import find, with_copies
from meddino_data_curation.changes.revision import NextEdition, changing, write_next
from meddino_data_curation.changes.tombstones import tombstone
from meddino_data_curation.held_out.exclusions import UNMATCHED
from meddino_data_curation.privacy import private_folder
from meddino_data_curation.selection.duplicates import Overlap, with_relatives

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Erased:
    """What an erasure did.

    Attributes:
        volumes: How many volumes are gone, refused ones and copies included.
        slices: How many slices.
        before: Names that were erased from this corpus before.
    """

    volumes: int
    slices: int
    before: tuple[str, ...]


def erase(root: Path, patients: Sequence[str], others: Sequence[str], salt_file: Path | None = None) -> Erased:
    """Take volumes out of a finished corpus: shards, manifests, fingerprints, report, private files.

    A salted tombstone of each stays and refuses the volume when it comes again; a patient's refuses all of that patient.
    Copies of a volume go with it. Killed anywhere, the same command goes on.

    Args:
        root: The corpus.
        patients: Ids of patients; all of a patient goes, and what is of the same study.
        others: Volume ids, files, folders, series or study UIDs, patients' ids.
        salt_file: The corpus's salt; None takes `<corpus>.private/salt`.

    Raises:
        ConfigError: A name means nothing in this corpus, nothing would be left, or the salt is not at hand.
        ShardError: It is no finished corpus.
    """
    if not (patients or others):
        raise ConfigError("nothing to erase: name a patient (--patient), a volume (--volume), or a file of names (--list)")
    with changing(root):
        edition = read_edition(root, salt_file)
        edition.need_salt()
        chosen, before = _chosen(edition, patients, others)
        if chosen:
            info = write_next(root, [edition], _without(edition, chosen))
            _logger.info("%s: %d slices of %d volumes are left", root, info["totals"]["slices"], info["totals"]["accepted"])
        _clean_private(root, [*patients, *others])
    gone = [row for row in edition.rows if row["volume_id"] in chosen]
    return Erased(len(gone), sum(row["num_slices_kept"] for row in gone), tuple(before))


def _chosen(edition: Edition, patients: Sequence[str], others: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Return ids of the volumes to erase with the key of the patient who goes as a whole, and names that were erased before."""
    whole: dict[str, str | None] = {}
    single: set[str] = set()
    before, unknown = [], []
    for name in dict.fromkeys([*patients, *others]):
        found = find(edition, name)
        ids = {row["volume_id"] for row in found.volumes}
        if name in patients or found.is_patient:
            whole.update({row["volume_id"]: row["patient_key"] for row in found.volumes})
        else:
            single |= ids
        if not ids and found.erased:
            before.append(name)
        elif not ids:
            unknown.append(name)
    # A name of which nothing is known may have been erased by file or volume: then its own row is gone.
    if unknown and not (whole or single or before):
        root = edition.corpus.root
        raise ConfigError(f"nothing in {root} is called '{unknown[0]}', or it was erased before; see `meddino-curate why`")
    for name in unknown:
        _logger.warning("nothing in %s is called '%s'", edition.corpus.root, name)
    rows = edition.rows
    seeds = sorted(whole)
    # Copies of other names are told to be of the patient: that is what refuses the patient's next scan.
    for one in with_relatives(rows, [Overlap(name, number, "patient") for number, name in enumerate(seeds)]):
        whole.setdefault(one.volume_id, whole[seeds[one.other]])
    return {**dict.fromkeys(with_copies(rows, single)), **whole}, before


def _without(edition: Edition, chosen: Mapping[str, str | None]) -> NextEdition:
    salt, info = edition.need_salt(), edition.corpus.info
    rows = [tombstone(row, salt, chosen[row["volume_id"]]) if row["volume_id"] in chosen else row for row in edition.rows]
    audits = []
    for entry in info.get("audit", []):
        if chosen.keys() & set(entry.get("overlapping_volumes", ())):
            _logger.warning("the audit against %s named an erased volume and is withdrawn; run it again", entry["name"])
        else:
            audits.append(entry)
    done = {"what": "erased", "volumes": len(chosen), "from": edition.corpus.content_hash}
    return NextEdition(
        rows=rows,
        prints={name: value for name, value in edition.prints.items() if name not in chosen},
        entries=[entry for entry in edition.entries if entry[0] not in chosen],
        audits=audits,
        lists=info.get("exclusion_lists", []),
        history=[*info.get("history", []), done],
    )


def _clean_private(root: Path, names: Sequence[str]) -> None:
    """Take the names out of what lists left in the private folder."""
    path = private_folder(root) / UNMATCHED
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not any(name in line for name in names)]
        if len(kept) < len(lines):
            write_text(path, "".join(kept))
            path.chmod(0o600)
