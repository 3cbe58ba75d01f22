"""What is left of an erased volume: salted hashes by which it is refused when it comes again, and nothing else."""

from collections.abc import Iterable, Sequence
from typing import Any

from meddino.data.overlap import content_key
from meddino_data_curation.privacy import Salt

Row = dict[str, Any]


def erased_content(salt: Salt, key: str) -> str:
    """Return what a tombstone says of voxels, from `overlap.content_key` of their hash."""
    return salt.key("erased content", key)


def erased_patient(salt: Salt, patient_key: str) -> str:
    """Return what a tombstone says of a patient whose volumes were all erased."""
    return salt.key("erased patient", patient_key)


def tombstone(row: Row, salt: Salt, patient_key: str | None) -> Row:
    """Return the row of an erased volume.

    Args:
        row: Of volumes.parquet.
        salt: Of the corpus.
        patient_key: Of the patient whose other volumes are to be refused too; None where only this volume goes.
    """
    kept = {name: row[name] for name in ("dataset", "modality", "licence")}
    says: Row = {"volume_id": salt.key("erased volume", row["volume_id"]), "status": "erased", "num_slices_kept": 0}
    if row["content_hash"]:
        says["content_hash"] = erased_content(salt, content_key(row["content_hash"]))
    if row["series_key"]:
        says["series_key"] = salt.key("erased series", row["series_key"])
    if patient_key:
        says["patient_key"] = erased_patient(salt, patient_key)
    return {**dict.fromkeys(row), **kept, **says, "slices_left_out": {}}


def refused_by_tombstones(rows: Sequence[Row], tombstones: Iterable[Row], salt: Salt) -> set[str]:
    """Return the ids of volumes that were erased before, or whose patient was.

    Args:
        rows: Volumes that come in.
        tombstones: Rows of any status; only erased ones count.
        salt: That the tombstones were made with.
    """
    stones = [row for row in tombstones if row["status"] == "erased"]
    names = ("content_hash", "series_key", "patient_key")
    contents, series, patients = ({row[name] for row in stones} - {None} for name in names)
    return {
        str(row["volume_id"])
        for row in rows
        if row["status"] != "erased"
        and (
            (row["content_hash"] and erased_content(salt, content_key(row["content_hash"])) in contents)
            or (row["series_key"] and salt.key("erased series", row["series_key"]) in series)
            or (row["patient_key"] and erased_patient(salt, row["patient_key"]) in patients)
        )
    }
