"""A held-out scan takes its copies and its patient's other scans along."""

import random

import pytest
from meddino_data_curation.selection.duplicates import Overlap, exclude_overlaps, find_overlaps, with_relatives


def row(name: str, **changes) -> dict:
    values = {
        "volume_id": name,
        "status": "accepted",
        "reason": None,
        "duplicate_of": None,
        "duplicate_kind": None,
        "format": "dicom",
        "content_hash": f"hash of {name}",
        "patient_key": f"patient of {name}",
        "study_key": None,
        "series_key": f"series {name}",
        "num_slices_kept": 3,
    }
    return {**values, **changes}


def test_find_overlaps__an_id_on_a_copy_speaks_for_the_volume_that_is_kept():
    rows = [
        row("nifti", format="nifti"),
        row("dicom", status="duplicate", duplicate_of="nifti", duplicate_kind="exact", patient_key="P"),
        row("flipped", status="duplicate", duplicate_of="nifti", duplicate_kind="near"),
        row("other"),
    ]
    overlaps = find_overlaps(rows, {}, [row("held", patient_key="P")], {})
    assert {overlap.volume_id: overlap.kind for overlap in overlaps} == dict.fromkeys(("nifti", "dicom", "flipped"), "patient")
    assert exclude_overlaps(rows, overlaps) == 3
    assert [item["status"] for item in rows] == ["rejected"] * 3 + ["accepted"]
    assert rows[0]["reason"] == "held out: the same patient is in the excluded data"
    assert rows[2]["duplicate_of"] is None


def test_find_overlaps__a_scan_without_an_id_leads_to_its_patient_and_study():
    rows = [
        row("venous", patient_key="P", study_key="S", content_hash="same"),
        row("arterial", patient_key=None, study_key="S"),
        row("next year", patient_key="P"),
        row("copy of it", status="duplicate", duplicate_of="next year"),
        row("other"),
    ]
    held_out = [row("imagesTs", format="nifti", content_hash="same", patient_key=None)]
    kinds = {overlap.volume_id: overlap.kind for overlap in find_overlaps(rows, {}, held_out, {})}
    assert kinds == {"venous": "exact", "arterial": "patient", "next year": "patient", "copy of it": "patient"}


def test_find_overlaps__what_is_refused_leads_on_but_is_none():
    rows = [row("damaged", status="rejected", content_hash=None, patient_key="P", study_key="S"), row("kept", study_key="S")]
    (overlap,) = find_overlaps(rows, {}, [row("held", patient_key="P")], {})
    assert (overlap.volume_id, overlap.kind) == ("kept", "patient")


def test_find_overlaps__equal_names_in_equally_named_folders_are_no_series():
    assert find_overlaps([row("a", format="nifti", series_key="k")], {}, [row("b", format="nifti", series_key="k")], {}) == []


def test_with_relatives__one_study_uid_for_everybody_leads_nowhere():
    rows = [row(f"{number}", study_key="constant") for number in range(9)]
    assert [overlap.volume_id for overlap in with_relatives(rows, [Overlap("0", 0, "exact")])] == ["0"]
    assert len(with_relatives(rows[:3], [Overlap("0", 0, "exact")])) == 3


def test_with_relatives__the_same_scan_says_more_than_the_same_patient():
    rows = [row("a", patient_key="P"), row("b", patient_key="P", content_hash="x"), row("c", content_hash="x")]
    found = with_relatives(rows, [Overlap("a", 0, "patient"), Overlap("b", 0, "patient"), Overlap("b", 1, "exact")])
    assert found[3:] == [Overlap("c", 1, "exact")]


def _random_row(draw: random.Random, name: str) -> dict:
    patient, study = draw.choice([None, f"p{draw.randrange(7)}"]), draw.choice([None, f"s{draw.randrange(10)}"])
    return row(name, content_hash=f"c{draw.randrange(9)}", patient_key=patient, study_key=study)


def _shares(first: dict, second: dict) -> bool:
    """Whether two volumes are one scan, one study or one patient, by any column that says so."""
    originals = {item["duplicate_of"] or item["volume_id"] for item in (first, second)}
    same = [first[name] is not None and first[name] == second[name] for name in ("content_hash", "patient_key", "study_key")]
    return len(originals) == 1 or any(same)


@pytest.mark.parametrize("seed", range(100))
def test_find_overlaps__nothing_stays_that_a_slow_search_can_reach(seed):
    draw = random.Random(seed)
    rows = [_random_row(draw, f"v{number}") for number in range(4)]  # no study has more patients than one can have ids
    rows += [row(f"w{number}", status="duplicate", duplicate_of=draw.choice(rows)["volume_id"]) for number in range(3)]
    held_out = [_random_row(draw, f"h{number}") for number in range(2)]
    reached = [item for item in rows if any(_shares(item, held) for held in held_out)]
    while more := [item for item in rows if item not in reached and any(_shares(item, other) for other in reached)]:
        reached += more
    overlaps = find_overlaps(rows, {}, held_out, {})
    assert {overlap.volume_id for overlap in overlaps} == {item["volume_id"] for item in reached}
    exclude_overlaps(rows, overlaps)
    assert find_overlaps(rows, {}, held_out, {}) == []
