import csv
from dataclasses import replace

import numpy as np
import pytest
from meddino_evaluation.cli import main
from meddino_evaluation.metrics.statistics import holm
from meddino_evaluation.metrics.unpaired import unpaired_means
from meddino_evaluation.study.out_of_distribution import drop_pair_table, drop_table, drops
from meddino_evaluation.tasks.fake_data import make_fake

from tests.evaluation.segmentation.test_compare import variant


def test_drops__each_site_beside_the_own_test_part_and_two_models_on_the_same_cases():
    rng = np.random.default_rng(0)
    inside = [rng.uniform(0.7, 0.9, (2, 12)) for _ in range(2)]
    # The first model loses 0.1 at A, the second 0.3; nobody loses at B.
    there = {
        "A": [inside[0][:, :9] - 0.1, inside[1][:, :9] - 0.3],
        "B": [rng.uniform(0.7, 0.9, (2, 10)) for _ in range(2)],
    }
    own = [variant(name, values) for name, values in zip(("robust", "brittle"), inside, strict=True)]
    sets = {site: [variant(one.name, values) for one, values in zip(own, found, strict=True)] for site, found in there.items()}
    found = drops(own, sets, resamples=500)
    assert [(row["set"], row["name"]) for row in found["drops"]] == [
        *(("A", "robust?"), ("A", "brittle?"), ("B", "robust?"), ("B", "brittle?")),
    ]
    means = [inside[0].mean(0), there["A"][0].mean(0)]
    cases = [dict(sorted(one.by_case("dice").items())) for one in (own[0], sets["A"][0])]
    values = [np.array(list(one.values())) for one in cases]
    row = found["drops"][0]
    expected = unpaired_means(*values, groups_a=list(cases[0]), groups_b=list(cases[1]), resamples=500)
    assert (row["inside"], row["outside"]) == pytest.approx((means[0].mean(), means[1].mean()))
    assert (row["difference"], row["low"], row["p"]) == pytest.approx((expected.difference, expected.low, expected.p_value))
    assert [one["p_holm"] for one in found["drops"]] == pytest.approx(holm([one["p"] for one in found["drops"]]).tolist())
    pair = found["pairs"][0]
    by_hand = (inside[0] - inside[1]).mean() - (there["A"][0] - there["A"][1]).mean()
    assert pair["difference"] == pytest.approx(by_hand)
    assert pair["p"] < 0.01 < found["pairs"][1]["p"]
    assert "robust - brittle" in drop_pair_table(found).markdown()
    assert drop_table(found).rows[1][:2] == ("A", "brittle?")


def test_drops__one_model_has_no_pair():
    one = variant("only", np.full((1, 8), 0.5) + np.arange(8) / 100)
    found = drops([one], {"A": [replace(one, name="only")]}, resamples=100)
    assert found["pairs"] == [] and found["drops"][0]["difference"] == pytest.approx(0)


def test_compare__two_backbones_on_one_site_and_all_others_side_by_side_from_the_tables_of_cases(tmp_path):
    make_fake("prostate_sites", tmp_path / "root", 4)
    models = ["--model", "vit=random:vitnano8", "--model", "resnet=random:timm:test_resnet"]
    words = ["compare", "--task", "prostate_sites", "--data", str(tmp_path / "root"), "--out", str(tmp_path / "out"), *models]
    size = ["data.resample=size", "data.size_px=48", "training.crop_px=48", "training.steps=3", "training.batch_size=2"]
    assert main([*words, "--config", "minutes", *size, "splits.folds=2", "metrics.bootstrap=100", "device=cpu"]) == 0
    rows = list(csv.DictReader((tmp_path / "out/drops.csv").open()))
    assert [(row["test set"], row["model"].partition(",")[0]) for row in rows] == [
        (site, model) for site in ("BIDMC", "HK", "RUNMC") for model in ("vit", "resnet")
    ]
    for row in rows:
        (run,) = (tmp_path / "out/runs").glob(f"{row['model'].partition(',')[0]}_frozen-*")
        for table, column in (("cases.csv", "Dice in distribution"), (f"external/{row['test set']}/cases.csv", "Dice there")):
            dice = [float(case["dice"]) for case in csv.DictReader((run / table).open())]
            assert float(row[column]) == pytest.approx(np.mean(dice), abs=6e-4)
    assert len(list(csv.DictReader((tmp_path / "out/drop_pairs.csv").open()))) == 3
    assert "In and out of distribution" in (tmp_path / "out/report.html").read_text()
