"""A finished corpus replaced by its next edition: all is written beside it first, then put in its place.

Killed before the last file was written, nothing has changed; killed after, `finish_interrupted` goes on. Shards of which every
volume stays are left as they are.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meddino.core.config import check_config
from meddino.core.errors import ConfigError
from meddino.core.files import atomic_write, write_text
from meddino.core.logging import get_logger
from meddino.data.manifests import SCHEMA_VERSION, SLICES_SCHEMA, read_info
from meddino.data.sample import SliceInfo
from meddino_data_curation.changes.edition import Edition, SourceEntry
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.corpus.manifests import REPORT, write_corpus_json, write_fingerprints, write_volumes
from meddino_data_curation.corpus.report import report_page
from meddino_data_curation.corpus.report_pictures import CorpusPictures
from meddino_data_curation.corpus.shards import write_shard
from meddino_data_curation.corpus.work_folder import NEXT, READY, WorkFolder
from meddino_data_curation.privacy import make_private, private_folder, write_refusals, write_source_map
from meddino_data_curation.selection.fingerprint import Fingerprint
from meddino_data_curation.selection.volume_job import HISTOGRAM_EDGES_HU

Row = dict[str, Any]
_logger = get_logger(__name__)
MANIFESTS = ("slices.parquet", "volumes.parquet", "fingerprints.parquet", REPORT)


@dataclass(frozen=True)
class NextEdition:
    """What a corpus is to hold.

    Attributes:
        rows: Of volumes.parquet; the accepted ones stay.
        prints: Of kept volumes.
        entries: The private source map.
        audits: For corpus.json.
        lists: What exclusion lists did.
        history: What was done and to which content, in words, oldest first.
    """

    rows: list[Row]
    prints: Mapping[str, Fingerprint]
    entries: Sequence[SourceEntry]
    audits: Sequence[Mapping[str, Any]] = ()
    lists: Sequence[Mapping[str, Any]] = ()
    history: Sequence[Mapping[str, Any]] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)


def write_next(out: Path, editions: Sequence[Edition], wanted: NextEdition) -> dict[str, Any]:
    """Write the next edition beside a corpus and put it in its place.

    Args:
        out: The corpus, one of the editions or new; its work folder is locked by the caller.
        editions: Where the slices come from, in the order of the new corpus.
        wanted: What it is to hold.

    Returns:
        The content of corpus.json.

    Raises:
        ConfigError: No slice would be left, or the editions were curated by different rules.
    """
    config = _common_config(editions)
    if not any(row["status"] == "accepted" for row in wanted.rows):
        raise ConfigError(f"{out} would hold no volume any more; remove the whole corpus and its private folder instead")
    work = WorkFolder(out)
    target, private = work.root / NEXT, private_folder(out)
    for folder in (target, private / NEXT):
        if folder.exists():
            shutil.rmtree(folder)
    (target / "shards").mkdir(parents=True)
    make_private(private / NEXT)
    slices = _write_shards(out, target, editions, wanted)
    with atomic_write(target / "slices.parquet") as stream:
        pq.write_table(slices, stream, compression="zstd", row_group_size=65536)
    write_volumes(target / "volumes.parquet", wanted.rows)
    if config.duplicates.near:
        write_fingerprints(target / "fingerprints.parquet", wanted.prints)
    files: dict[str, int] = {}
    for edition in editions:
        for kind, count in edition.corpus.info.get("files", {}).items():
            files[kind] = files.get(kind, 0) + int(count)
    pictures = CorpusPictures([edition.corpus for edition in editions], files, HISTOGRAM_EDGES_HU)
    write_text(target / REPORT, report_page(config, wanted.rows, pictures, wanted.audits, wanted.lists))
    salt = editions[0].corpus.info.get("salt_fingerprint", "")
    info = write_corpus_json(
        target, config, wanted.rows, wanted.notes, slices.num_rows, salt, wanted.audits, wanted.lists, files, wanted.history
    )
    write_source_map(private / NEXT, "sources", wanted.entries)
    write_refusals(private / NEXT, wanted.rows, wanted.entries)
    write_text(target / READY, "")
    finish_interrupted(out)
    return info


@contextmanager
def changing(out: Path, is_new: bool = False) -> Iterator[bool]:
    """Keep others away from a corpus while its next edition is made; what a killed change left is finished first.

    Args:
        out: The corpus.
        is_new: Whether it is made only now.

    Yields:
        Whether there was something to finish.

    Raises:
        ConfigError: Others are at work there, or it is a build that is not finished.
        ShardError: It is no corpus.
    """
    work = WorkFolder(out)
    if not is_new and not work.is_changing():
        read_info(out)
    if (work.root / "volumes").exists():
        raise ConfigError(f"{out} is a build that is not finished; run its `meddino-curate build` to the end first")
    with work.locked(shared=False):
        try:
            resumed = finish_interrupted(out)
            if resumed:
                _logger.info("%s: a change that was interrupted is finished now", out)
            yield resumed
        finally:
            if not work.is_changing():
                work.remove()


def finish_interrupted(out: Path) -> bool:
    """Put a next edition in its place that was written whole; one that was not is thrown away. The same again does nothing.

    Returns:
        Whether there was one.
    """
    work = WorkFolder(out)
    target, private = work.root / NEXT, private_folder(out)
    if not (target / READY).is_file():
        for folder in (target, private / NEXT):
            shutil.rmtree(folder, ignore_errors=True)
        return False
    # Without corpus.json nobody takes what is half in its place for a corpus.
    info = target / "corpus.json"
    if info.is_file():
        (out / "corpus.json").unlink(missing_ok=True)
        for name in MANIFESTS:
            if (target / name).is_file():
                (target / name).replace(out / name)
        (out / "shards").mkdir(exist_ok=True)
        for path in sorted((target / "shards").iterdir()):
            path.replace(out / "shards" / path.name)
        known = set(pc.unique(pq.read_table(out / "slices.parquet", columns=["shard"]).column("shard")).to_pylist())
        for path in (out / "shards").iterdir():
            if path.name not in known:
                path.unlink()
        if (private / NEXT).is_dir():
            for path in private.glob("sources*.jsonl"):
                if (private / NEXT / "sources.jsonl").is_file():
                    path.unlink()
            for path in sorted((private / NEXT).iterdir()):
                path.replace(private / path.name)
        info.replace(out / "corpus.json")
    shutil.rmtree(private / NEXT, ignore_errors=True)
    shutil.rmtree(target)
    return True


def _common_config(editions: Sequence[Edition]) -> CurationConfig:
    """Return the config of all editions: their sources together, the rest of the first."""
    sources: dict[str, dict[str, Any]] = {}
    first = editions[0].corpus.info["config"]
    for edition in editions:
        config = edition.corpus.info["config"]
        for source in config["sources"]:
            sources.setdefault(source["name"], {**source, "path": "."})
        for section in ("hounsfield", "orientation", "slices", "inplane"):
            if config.get(section) != first.get(section):
                differing = [key for key in config[section] if config[section][key] != first.get(section, {}).get(key)]
                key = differing[0] if differing else section
                raise ConfigError(
                    f"{edition.corpus.root} was curated with {section}.{key}={config[section].get(key)}, "
                    f"{editions[0].corpus.root} with {first.get(section, {}).get(key)}; corpora of one kind can be put together"
                )
    values = {**first, "sources": [sources[name] for name in sources]}
    return check_config(CurationConfig, values, where=f"{editions[0].corpus.root / 'corpus.json'}: config")


def _write_shards(out: Path, target: Path, editions: Sequence[Edition], wanted: NextEdition) -> pa.Table:
    """Write the shards that change, and return slices.parquet; `wanted.notes` gets what corpus.json says of each."""
    waiting = {row["volume_id"] for row in wanted.rows if row["status"] == "accepted"}
    names = _FreeNames(out, editions)
    tables = []
    for edition in editions:
        corpus = edition.corpus
        in_place = corpus.root.resolve() == out.resolve()
        slices = corpus.slices.select(SLICES_SCHEMA.names)
        start = 0
        for shard, group in groupby(slices.column("shard").to_pylist()):
            count = sum(1 for _ in group)
            part = slices.slice(start, count)
            start += count
            mask = [volume_id in waiting for volume_id in part.column("volume_id").to_pylist()]
            if not any(mask):
                continue
            note = corpus.info["shards"][shard]
            if all(mask) and corpus.info["schema_version"] == SCHEMA_VERSION:
                name = shard if in_place else names.new()
                if not in_place:
                    shutil.copyfile(corpus.root / "shards" / shard, target / "shards" / name)
                said = {"sha256": note["sha256"], "bytes": note["bytes"]}
            else:
                part = part.filter(pa.array(mask))
                name = names.after(shard) if in_place else names.new()
                said = write_shard(target / "shards" / name, _samples(edition, part))
                part = _with(part, "offset", said["offsets"])
            part = _with(part, "shard", [name] * part.num_rows)
            wanted.notes[name] = {**said, "volumes": sorted(set(part.column("volume_id").to_pylist()))}
            tables.append(part.cast(SLICES_SCHEMA))
        # A volume that several editions hold under one id is written once, of the first of them.
        waiting -= set(pc.unique(slices.column("volume_id")).to_pylist())
    return pa.concat_tables(tables)


def _with(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def _samples(edition: Edition, part: pa.Table) -> Iterator[tuple[str, SliceInfo, bytes]]:
    datasets = {row["volume_id"]: row["dataset"] for row in edition.rows}
    for row in part.to_pylist():
        data = edition.corpus.shards.read(row["shard"], row["offset"], row["length"], row["crc32"])
        spacing = tuple(row["spacing_mm"]) if row["spacing_mm"] is not None else None
        where = (row["volume_id"], row["z_index"], row["z_mm"], spacing, row["thickness_mm"])
        yield row["key"], SliceInfo(*where, datasets[row["volume_id"]], row["codec"], row["modality"]), data


class _FreeNames:
    """Names for shards that no shard has."""

    def __init__(self, out: Path, editions: Sequence[Edition]) -> None:
        own = [edition for edition in editions if edition.corpus.root.resolve() == out.resolve()]
        self.taken = {str(name) for edition in own for name in edition.corpus.info["shards"]}
        self.number = len(self.taken)

    def new(self) -> str:
        """Return the next number's."""
        while (name := f"slices-{self.number:06d}.tar") in self.taken:
            self.number += 1
        self.taken.add(name)
        return name

    def after(self, shard: str) -> str:
        """Return a name for a shard that takes another's place; an old reader must not find other slices under its name."""
        stem, _, edition = shard.removesuffix(".tar").partition(".")
        number = int(edition or 1) + 1
        while (name := f"{stem}.{number}.tar") in self.taken:
            number += 1
        self.taken.add(name)
        return name
