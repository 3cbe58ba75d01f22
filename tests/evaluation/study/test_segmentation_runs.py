import csv
import re
from dataclasses import replace

import numpy as np
import pytest
from meddino_evaluation.study.compare_command import comparison_html, main_table, write_comparison
from meddino_evaluation.study.out_of_distribution import drops
from meddino_evaluation.study.segmentation_runs import Variant, check_comparable, compare, training_differences

from meddino.core.errors import ConfigError
from meddino.core.files import write_json
from tests.evaluation.segmentation.test_compare import variant


def without(run: Variant, *cases: str) -> Variant:
    return replace(run, rows=[row for row in run.rows if row["case"] not in cases])


def said(run: Variant, **sections: dict) -> Variant:
    """A run whose metrics.json says more."""
    metrics = {**run.metrics, **{key: {**run.metrics.get(key, {}), **more} for key, more in sections.items()}}
    return replace(run, metrics=metrics)


def test_compare__mean_and_deviation_are_of_the_shared_cases_and_what_is_left_out_is_told(tmp_path):
    dice = np.random.default_rng(0).uniform(0.4, 0.9, (3, 10))
    runs = [variant("whole", dice), without(variant("part", dice - 0.1), "c0", "c7")]
    found = compare(runs, resamples=100)
    shared = np.delete(dice, [0, 7], axis=1).mean(1)
    assert found["variants"][0]["mean"] == pytest.approx(shared.mean())
    assert found["variants"][0]["std_over_seeds"] == pytest.approx(shared.std(ddof=1))
    assert found["variants"][0]["mean"] - found["variants"][1]["mean"] == pytest.approx(found["pairs"][0]["difference"])
    assert found["left_out"] == {"whole": ["c0", "c7"]}
    (note,) = found["notes"]
    assert note.startswith("whole: 2 of its 10 test cases are left out") and note.endswith(": c0, c7")
    write_comparison(found, runs, tmp_path, {})
    for name in ("comparison.md", "comparison_compact.tex", "report.html"):
        assert note in (tmp_path / name).read_text()
    with (tmp_path / "comparison.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == len(main_table(found).rows)


def test_drops__first_run_that_lacks_cases_of_the_others():
    dice = np.random.default_rng(1).uniform(0.4, 0.9, (2, 10))
    runs = [without(variant("few", dice), "c3"), variant("b", dice - 0.1), variant("c", dice - 0.2)]
    found = drops(runs, {"A": [without(runs[0], "c9"), *runs[1:]]}, resamples=100)
    means = np.delete(dice, 3, axis=1).mean(), np.delete(dice, [3, 9], axis=1).mean()
    for row, less in zip(found["drops"], (0.0, 0.1, 0.2), strict=True):
        assert (row["inside"], row["outside"], row["cases"]) == pytest.approx((means[0] - less, means[1] - less, 8))
    assert len(found["pairs"]) == 3


def test_compare__a_case_of_two_patients_is_refused():
    runs = [variant("a", np.full((1, 4), 0.5)), variant("b", np.full((1, 4), 0.6))]
    runs[1].rows[2]["patient"] = "somebody"
    with pytest.raises(ConfigError, match="case c2 is of patient 'c2' in nowhere and of 'somebody'"):
        compare(runs)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ([{"data": {"labels": ["lung"]}}, {"data": {"labels": ["lung", "liver"]}}], "labels differ: a: ['lung']; b: ['liver'"),
        ([{"data": {"modality": "ct"}}, {"data": {"modality": "mr"}}], "modalities differ: a: ct; b: mr"),
        (
            [{"config": {"metrics": {"tolerance_mm": tolerance}}} for tolerance in (1.0, 2.0)],
            "tolerances of surfaces (metrics.tolerance_mm) differ: a: 1.0; b: 2.0",
        ),
    ],
)
def test_compare__runs_that_measure_other_things_are_refused(sections, words):
    dice = np.full((1, 4), 0.5)
    runs = [said(variant(name, dice), **own) for name, own in zip("ab", sections, strict=True)]
    with pytest.raises(ConfigError, match=re.escape(words)):
        compare(runs)
    check_comparable([runs[0], variant("old", dice)])  # whose metrics.json does not say


def test_training_differences__other_training_cases_and_settings(tmp_path):
    runs = []
    for name, labelled, seeds, steps in (("a", ["x", "y"], [0], 10), ("b", ["x", "y"], [0], 10), ("c", ["x"], [0, 1], 20)):
        config = {"seeds": seeds, "training": {"steps": steps, "log_every_steps": steps}, "device": name}
        run = said(variant(name, np.full((len(seeds), 4), 0.5)), config=config)
        parts = [
            {"fold": 0, "test": ["c0", "c1"], "labelled": {str(seed): labelled for seed in seeds}},
            {"fold": 1, "test": ["c2", "c3"], "labelled": {str(seed): ["x"] for seed in seeds}},
        ]
        write_json(tmp_path / name / "splits.json", parts)
        runs.append(replace(run, folder=tmp_path / name))
    assert training_differences(runs[:2]) == []
    assert training_differences(runs) == [
        "c against a: 2 of 4 test cases were tested on networks that learned from other cases: c0, c1",
        "c against a: seeds: [0] -> [0, 1]",
        "c against a: training.steps: 10 -> 20",
    ]
    (tmp_path / "b" / "splits.json").unlink()
    assert training_differences(runs[:2]) == ["b: no splits.json tells from which cases its networks learned"]


def test_comparison_html__notes_of_test_sets_from_elsewhere():
    runs = [variant("a", np.full((1, 8), 0.5)), without(variant("b", np.full((1, 8), 0.6)), "c2")]
    page = comparison_html(compare(runs[:1]), runs[:1], {"A": compare(runs, resamples=100)})
    assert "a: 1 of its 8 test cases are left out" in page
