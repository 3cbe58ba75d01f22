"""`meddino-curate audit`: does a corpus hold anything of data that must stay unseen?"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddino.core.config import check_config
from meddino.core.errors import ConfigError
from meddino.core.files import sha256_file, write_json, write_text
from meddino.core.logging import get_logger
from meddino.data.corpus import Corpus
from meddino_data_curation.config import CurationConfig, SourceConfig
from meddino_data_curation.duplicates import Overlap, find_overlaps
from meddino_data_curation.manifests import REPORT, read_fingerprints
from meddino_data_curation.privacy import Salt, load_salt, private_folder
from meddino_data_curation.report import with_audits
from meddino_data_curation.survey import Survey, survey

_logger = get_logger(__name__)


@dataclass(frozen=True)
class AuditResult:
    """What an audit against one data set found.

    Attributes:
        name: Of the data set.
        lines: One a overlap, for the owner's eyes: they name files.
        entry: What corpus.json records; names nobody.
    """

    name: str
    lines: tuple[str, ...]
    entry: dict[str, Any]


def audit(
    root: Path, against: Sequence[Path], names: Sequence[str], salt_file: Path | None, workers: int | None = None
) -> list[AuditResult]:
    """Compare a corpus with data sets and record the result in its corpus.json.

    Args:
        root: The corpus.
        against: Folders of volumes, files, or other corpora.
        names: What they are called in the record, in their order; the rest are dataset-1, dataset-2, ...
        salt_file: The corpus's salt; None takes `<corpus>.private/salt`. Without it patients cannot be compared.
        workers: Processes; None takes one a core.

    Raises:
        ConfigError: A data set is missing, or the salt is another one.
        ShardError: It is no corpus.
    """
    corpus = Corpus(root)
    salt = _salt(corpus, salt_file)
    config = CurationConfig(workers=workers)
    prints = read_fingerprints(root / "fingerprints.parquet")
    rows = corpus.volumes.to_pylist()
    called = [*names[: len(against)], *(f"dataset-{number}" for number in range(len(names) + 1, len(against) + 1))]
    sources = [
        check_config(SourceConfig, {"name": name, "path": str(path)}, where="--against, --name")
        for name, path in zip(called, against, strict=True)
    ]
    results = []
    for source in sources:
        held_out = survey([source], config, salt)
        overlaps = find_overlaps(rows, prints, held_out.rows, held_out.prints)
        results.append(AuditResult(source.name, _lines(overlaps, held_out), audit_entry(source.name, held_out, overlaps)))
    _record(root, corpus.info, results)
    return results


def _record(root: Path, info: dict[str, Any], results: Sequence[AuditResult]) -> None:
    """Write the results into report.html and, last, into corpus.json with the report's new checksum."""
    known = {entry["name"]: entry for entry in info.get("audit", [])}
    # What a build left out for a set stays true, whatever an audit finds later.
    for result in results:
        left_out = {key: value for key, value in known.get(result.name, {}).items() if key == "left_out"}
        known[result.name] = {**result.entry, **left_out}
    audits = [known[name] for name in sorted(known)]
    manifests = dict(info["manifests"])
    path = root / REPORT
    report = with_audits(path.read_text(encoding="utf-8"), audits) if path.is_file() else None
    if report is None:
        _logger.warning("%s has no place for audits; they stand in corpus.json only", path)
    else:
        write_text(path, report)
        manifests[REPORT] = sha256_file(path)
    write_json(root / "corpus.json", {**info, "audit": audits, "manifests": manifests})


def audit_entry(name: str, held_out: Survey, overlaps: Sequence[Overlap]) -> dict[str, Any]:
    """Return what corpus.json says of one comparison.

    Returns:
        name, volumes compared, how many could not be read, a hash of their content, and the overlaps by kind.
    """
    content = "\n".join(sorted(str(row["content_hash"]) for row in held_out.rows))
    return {
        "name": name,
        "volumes": len(held_out.rows),
        "unread": held_out.unread,
        "content_hash": hashlib.sha256(content.encode()).hexdigest(),
        "overlaps": len(overlaps),
        "overlaps_by_kind": dict(sorted(Counter(overlap.kind for overlap in overlaps).items())),
        "overlapping_volumes": sorted({overlap.volume_id for overlap in overlaps}),
    }


def _lines(overlaps: Sequence[Overlap], held_out: Survey) -> tuple[str, ...]:
    lines = []
    for overlap in overlaps:
        place = held_out.places[held_out.rows[overlap.other]["volume_id"]]
        similarity = f" ({overlap.similarity:.3f})" if overlap.kind == "near" else ""
        lines.append(f"{overlap.volume_id} is by {overlap.kind}{similarity}: {place}")
    return tuple(lines)


def _salt(corpus: Corpus, salt_file: Path | None) -> Salt:
    default = private_folder(corpus.root) / "salt"
    path = salt_file or (default if default.exists() else None)
    if path is None:
        return Salt(hashlib.sha256(str(corpus.content_hash).encode()).digest())  # content is compared all the same
    salt = load_salt(path, corpus.root)
    if salt.fingerprint != corpus.info.get("salt_fingerprint"):
        raise ConfigError(f"the salt in {path} is not the one {corpus.root} was made with; patients cannot be compared")
    return salt
