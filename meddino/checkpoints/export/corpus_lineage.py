"""What a corpus adds to the lineage of the weights trained on it."""

from collections import Counter
from typing import Any

from meddino.checkpoints.export.model_folder import DataRecord
from meddino.checkpoints.export.training_volumes import list_record, volume_list
from meddino.data.audits import says_something
from meddino.data.corpus import Corpus


def corpus_lineage(corpus: Corpus) -> dict[str, Any]:
    """Return `corpus_hash`, `data`, `training_volumes` and `audited_against`, as JSON.

    `data` are the data sets with their licences and accepted volumes.

    Args:
        corpus: The trainer puts this into its checkpoints' `lineage`.
    """
    columns = corpus.volumes.select(["dataset", "licence", "status"]).to_pylist()
    counts = Counter((row["dataset"], row["licence"]) for row in columns if row["status"] == "accepted")
    records = [DataRecord(dataset=name, licence=licence, volumes=count) for (name, licence), count in sorted(counts.items())]
    return {
        "corpus_hash": corpus.content_hash,
        "data": [record.model_dump(mode="json") for record in records],
        "training_volumes": list_record(volume_list(corpus)).model_dump(mode="json"),
        "audited_against": [_audit_text(entry) for entry in corpus.info.get("audit", []) if says_something(entry)],
    }


def _audit_text(entry: dict[str, Any]) -> str:
    """Return a test set's name; with what was found of it, and what of it could not be looked at."""
    counts = {"overlaps": int(entry.get("overlaps", 0)), "volumes unread": int(entry.get("unread", 0))}
    told = [f"{count} {what}" for what, count in counts.items() if count]
    if not entry.get("compared", {"patient": 1}).get("patient"):
        told.append("patients not compared")
    return f"{entry['name']} ({', '.join(told)})" if told else str(entry["name"])
