import json
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from meddino_evaluation.cli import main
from meddino_evaluation.metrics.statistics import paired_means, wilcoxon_signed_rank
from meddino_evaluation.study.compare_command import comparison_html, contents_hash, main_table, too_few
from meddino_evaluation.study.segmentation_runs import Variant, compare, rank_stability

from tests.browser import check_page


def variant(name: str, dice: np.ndarray, data: str = "d", leaked: list[str] | None = None) -> Variant:
    """`dice` [seeds, cases]."""
    rows = [
        {"case": f"c{c}", "label": "a", "dice": value, "seed": float(s), "fold": 0.0, "patient": f"c{c}", "site": ""}
        for s, row in enumerate(dice)
        for c, value in enumerate(row)
    ]
    metrics = {
        "model": {"name": name},
        "data": {"hash": data, "name": data},
        "leakage": {"checked": leaked is not None, "test_cases_in_pretraining": leaked or []},
        "test": {"dice": {"by_seed": dice.mean(1).tolist()}, "seeds": list(range(len(dice)))},
    }
    return Variant(name, Path("nowhere"), metrics, rows)


def test_compare__means_tests_and_holm_by_hand():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.4, 0.8, (3, 20))
    variants = [variant("good", base + 0.1), variant("same", base), variant("bad", base - rng.uniform(0.0, 0.2, (3, 20)))]
    found = compare(variants, resamples=500)
    assert [entry["mean"] for entry in found["variants"]] == pytest.approx(
        [v.by_case("dice") and np.mean(list(v.by_case("dice").values())) for v in variants]
    )
    assert found["variants"][0]["std_over_seeds"] == pytest.approx(np.std((base + 0.1).mean(1), ddof=1))
    first, second = (np.array(list(v.by_case("dice").values())) for v in variants[:2])
    pair = found["pairs"][0]
    assert pair["p_wilcoxon"] == pytest.approx(wilcoxon_signed_rank(first, second))
    assert pair["difference"] == pytest.approx(0.1)
    assert pair["interval_95"] == [None, None]  # 0.1 in every case: an interval without width would claim certainty
    best, worst = ([v.by_case("dice")[case] for case in sorted(v.by_case("dice"))] for v in (variants[0], variants[2]))
    other = paired_means(best, worst, resamples=500)
    assert found["pairs"][1]["interval_95"] == [other.low, other.high]
    assert found["pairs"][1]["p_permutation"] == other.p_value
    assert (found["pairs"][1]["smallest_p"], found["pairs"][1]["permutations"]) == (1 / 10_000, 9999)
    raw = sorted(p["p_wilcoxon"] for p in found["pairs"])
    adjusted = sorted(p["p_wilcoxon_holm"] for p in found["pairs"])
    by_hand = np.maximum.accumulate(np.minimum(1, np.array(raw) * [3, 2, 1]))
    assert adjusted == pytest.approx(by_hand)
    assert [entry["mean_rank"] for entry in found["variants"]] == [1.0, 2.0, 3.0]
    assert found["ranking_tau"] == pytest.approx(1.0)


def test_rank_stability__two_models_that_cannot_be_told_apart():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, 40))
    values -= values.mean(axis=1, keepdims=True)
    ranks, _ = rank_stability(values, [f"p{i}" for i in range(40)], 1000)
    assert abs(ranks[0][1] - 0.5) < 0.12
    assert ranks[0][0] + ranks[1][0] == pytest.approx(3.0)


@pytest.mark.parametrize("patients", range(1, 8))
def test_compare__of_fewer_than_six_patients_nothing_says_how_sure_it_is(patients):
    rng = np.random.default_rng(patients)
    base = rng.uniform(0.4, 0.8, (3, patients))
    variants = [variant("good", base + rng.uniform(0.0, 0.2, base.shape)), variant("bad", base)]
    found = compare(variants, resamples=200)
    entry, pair = found["variants"][0], found["pairs"][0]
    sure = [entry["mean_rank"], entry["share_first"], *entry["interval_95"], found["ranking_tau"]]
    sure += [*pair["interval_95"], pair["p_wilcoxon"], pair["p_wilcoxon_holm"], pair["p_permutation_holm"]]
    cells = dict(zip(main_table(found).header, main_table(found).rows[0], strict=True))
    page = comparison_html(found, variants, {})
    if patients >= 6:
        assert None not in sure and too_few(found) == "" and cells["first"].endswith(" %")
        assert "tau between this ranking" in page
    else:
        assert set(sure) == {None} and (cells["first"], cells["mean rank"], cells["95 % over patients"]) == ("-", "-", "-")
        assert f"{patients} patient" in too_few(found) and "fewer than six" in too_few(found)
        assert "tau between this ranking" not in page and "fewer than six no interval" in page
    assert entry["mean"] > found["variants"][1]["mean"] and pair["difference"] > 0  # what was measured stands


def test_compare__other_data_is_refused_and_marks_are_shown():
    from meddino.core.errors import ConfigError

    dice = np.full((3, 4), 0.5)
    with pytest.raises(ConfigError, match="different data"):
        compare([variant("a", dice), variant("b", dice, data="other")])
    marks = [v.leakage_mark for v in (variant("m", dice), variant("m", dice, leaked=[]), variant("m", dice, leaked=["c1"]))]
    assert marks == ["?", "", "†"]
    assert variant("random:x", dice).leakage_mark == ""


def test_compare_command__runs_models_and_writes_every_table(make_dataset, tiny_config, tmp_path, capsys):
    from meddino.core.config import to_yaml
    from meddino.core.files import write_text

    write_text(tmp_path / "tiny.yaml", to_yaml(tiny_config(training={"steps": 2})))
    out = tmp_path / "out"
    arguments = ["compare", "--data", str(make_dataset()), "--out", str(out), "--config", str(tmp_path / "tiny.yaml")]
    models = ["--model", "first=random:vitnano8", "--model", "second=random:vitnano8", "--modes", "frozen", "finetune"]
    arguments = [*arguments, *models, "--skip", "second:finetune", "encoder.random_seed=3"]
    assert main([*arguments, "--part", "1/3"]) == 0
    assert main([*arguments, "--list"]) == 0
    assert [line.split()[1:3] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["done", ANY],
        ["to", "do"],
        ["to", "do"],
    ]
    assert main([*arguments, "--figures", "pdf"]) == 0
    said = capsys.readouterr()
    assert "first, finetune" in said.out
    assert "from fewer than six no interval" in said.out
    assert "job 3 of 3: second, frozen (" in said.err
    assert (out / "figures" / "forest.pdf").stat().st_size > 0
    for name in ("comparison.csv", "comparison.md", "comparison_compact.tex", "pairs.csv", "comparison.json", "report.html"):
        assert (out / name).stat().st_size > 0
    found = json.loads((out / "comparison.json").read_text())
    assert [entry["name"] for entry in found["variants"]] == ["first, frozen", "first, finetune", "second, frozen"]
    assert len(found["pairs"]) == 3
    page = (out / "report.html").read_text()
    for words in (
        "reference",
        "second, frozen, Dice",
        "the grey line is no difference",
        "soft-tissue window",
        'class="legend"',
    ):
        assert words in page, words
    folders = {path.name.partition("-")[0]: path for path in (out / "runs").iterdir()}
    runs = [f"--results={name}={folders[folder]}" for name, folder in (("a", "first_frozen"), ("b", "second_frozen"))]
    assert main(["compare", *runs, "--out", str(tmp_path / "again")]) == 0
    assert main(["compare", "--out", str(out)]) == 2
    assert main(["compare", "--model", "nothing", "--out", str(out)]) == 2
    assert main(["compare", "--results", f"a={tmp_path}", "--out", str(out)]) == 2
    assert set(check_page(out / "report.html")["rows"]) == {1}  # reference | first | first | second


def test_compare__settings_right_after_the_modes_are_told_where_they_go(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--out", str(tmp_path), "--modes", "frozen", "labels.train_cases=8"])
    assert ended.value.code == 2 and "put key=value before --modes" in capsys.readouterr().err


def test_contents_hash__other_label_maps_are_other_jobs(make_dataset):
    root = make_dataset()
    first = contents_hash(root)
    assert contents_hash(root) == first
    one, two = sorted((root / "labelsTr").iterdir())[:2]
    one.write_bytes(two.read_bytes())
    assert (second := contents_hash(root)) != first
    names = [path.name.removesuffix(".nii.gz") for path in sorted((root / "labelsTr").iterdir())]
    (root / "patients.csv").write_text("case,patient\n" + "".join(f"{name},{names[0]}\n" for name in names))
    assert (third := contents_hash(root)) != second
    (root / "splits_final.json").write_text("[]")
    assert contents_hash(root) != third
