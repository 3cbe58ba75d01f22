"""The study of what pretraining is worth: its order, what it skips, and its table from planted counts."""

import csv
import json

import numpy as np
import pytest
from meddino_pretrain.config import PretrainConfig

from meddino.core.config import differences, load_config
from tests.benchmarks import bench_worth
from tests.benchmarks.bench_worth import (
    ARMS,
    DATASET,
    STEPS,
    WHOLE,
    Part,
    as_markdown,
    main,
    over_patients_and_seeds,
    patient_scores,
    probe_parts,
    read_rows,
    run_parts,
    swap_parts,
    training_parts,
)


def test_parts__first_stages_of_all_seeds_come_first(tmp_path):
    parts = list(training_parts(tmp_path, ["all", "no_ibot"], [3, 4]))
    stages = [(part.done.parents[2].name, part.done.parents[1].name) for part in parts]
    assert stages[:3] == [("all_s3", "stage1_pretrain"), ("all_s4", "stage1_pretrain"), ("all_s3", "stage2_gram")]
    assert stages[6:] == [("no_ibot_s3", "stage1_pretrain"), ("no_ibot_s4", "stage1_pretrain")]
    assert parts[-1].words[-2:] == ("seed=4", "stages.stage1_pretrain.method.losses.ibot_weight=0")


def test_parts__only_what_is_trained_is_probed_beside_random_weights_of_its_architecture(tmp_path):
    done = next(training_parts(tmp_path, ["all"], [0])).done
    done.mkdir(parents=True)
    parts = list(probe_parts(tmp_path, ["all"], [0, 1]))
    names = ["all_s0-stage1_pretrain", "random_s0-random", "random_s1-random"]
    assert [part.done.parent.name for part in parts] == names
    assert f"probed=random:{done}" in parts[2].words and parts[2].words[-1] == "random_seed=1"


def test_arms__are_changes_of_the_demos_recipe():
    demo = load_config(PretrainConfig, ["demo"], kind="pretrain")
    assert {name: stage.steps for name, stage in demo.stages.items()} == STEPS
    for arm, changes in ARMS.items():
        config = load_config(PretrainConfig, ["demo"], changes, kind="pretrain")
        assert len(differences(demo.model_dump(mode="json"), config.model_dump(mode="json"))) == len(changes), arm


def test_run__what_is_done_is_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(bench_worth.subprocess, "run", lambda words, **_: ran.append(words[1:]))
    run_parts([Part(tmp_path, ("eval", "no")), Part(tmp_path / "later", ("eval", "yes"))])
    assert ran == [["yes"]]


def test_swap__once_and_after_an_interruption(tmp_path):
    for kind in ("images", "labels"):
        for part, count in (("Tr", 3), ("Ts", 1)):
            (tmp_path / f"{kind}{part}").mkdir()
            for number in range(count):
                (tmp_path / f"{kind}{part}" / str(number)).touch()
    for name in ("Tr", "Ts"):  # images are swapped already
        (tmp_path / f"images{name}").rename(tmp_path / f"x{name}")
    (tmp_path / "xTr").rename(tmp_path / "imagesTs")
    (tmp_path / "xTs").rename(tmp_path / "imagesTr")
    for _ in range(2):
        swap_parts(tmp_path)
        assert [len(list((tmp_path / name).iterdir())) for name in ("imagesTr", "imagesTs", "labelsTr", "labelsTs")] == [
            1,
            3,
            1,
            3,
        ]


def write_probe(folder, right: float, pixels: float = 0.1) -> None:
    """A probe of eight patients, two organs and two draws: the share of right patches, a little different for each patient."""
    folder.mkdir(parents=True)
    models = {"probed": right, "pixels": pixels}
    with (folder / "cases.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["model", "readout", "setting", "fold", "seed", "patient", "label", "tp", "fp", "fn"])
        for model, share in models.items():
            for seed in range(2):
                for patient in range(8):
                    tp = round(1000 * share) + patient
                    rows.writerow([model, "chosen", "", 0, seed, f"p{patient}", "liver", tp, 1000 - tp, 1000 - tp])
                    rows.writerow([model, "chosen", "", 0, seed, f"p{patient}", "spleen", 0, 0, 0])  # not there: not counted
                    rows.writerow([model, "knn/blocks1", "", 0, seed, f"p{patient}", "liver", 0, 1, 1])
    chosen = {model: {"chosen": {"macro_f1": {"mean": share}}} for model, share in models.items()}
    (folder / "metrics.json").write_text(json.dumps({"models": chosen}))


@pytest.fixture
def study(tmp_path):
    for seed, share in ((0, 0.4), (1, 0.5)):
        write_probe(tmp_path / "probes" / f"all_s{seed}-stage1_pretrain", share)
        write_probe(tmp_path / "probes" / f"random_s{seed}-random", 0.2 + seed / 100)
    write_probe(tmp_path / "probes" / "no_ibot_s0-stage1_pretrain", 0.21)
    return tmp_path


def test_rows__means_differences_and_tests(study):
    scores = patient_scores(study / "probes" / "all_s0-stage1_pretrain", "probed")
    assert scores == {f"p{number}": pytest.approx(0.4 + number / 1000) for number in range(8)}
    rows = {row.name: row for row in read_rows(study)}
    assert list(rows) == ["pixels", "random", "no_ibot, stage1_pretrain", "all, stage1_pretrain"]
    one = rows["all, stage1_pretrain"]
    assert one.seeds == (0, 1) and one.by_seed == (0.4, 0.5) and one.pooled == pytest.approx(0.45)
    assert one.mean == pytest.approx(0.4535) and one.std_over_seeds == pytest.approx(0.05 * 2**0.5)
    assert one.difference == pytest.approx(0.245)
    assert one.p == pytest.approx(2 / 2**8) and one.p_holm == pytest.approx(3 * 2 / 2**8)
    assert one.both_95[0] < 0.2 and one.both_95[1] > 0.29  # seeds differ more than patients
    assert np.isnan(rows["no_ibot, stage1_pretrain"].both_95).all()
    ablation = {row.name: row for row in read_rows(study, WHOLE)}
    assert list(ablation) == ["no_ibot, stage1_pretrain", WHOLE] and np.isnan(ablation[WHOLE].difference)
    assert ablation["no_ibot, stage1_pretrain"].difference == pytest.approx(-0.24)


def test_interval__of_equal_seeds_is_that_over_patients():
    table = np.tile(np.linspace(0.3, 0.6, 10), (3, 1))
    low, high = over_patients_and_seeds(table, np.zeros((2, 10)))
    assert 0.3 < low < 0.45 < high < 0.6


def test_main__table_of_what_there_is(study, capsys):
    main(["--out", str(study), "--only", "table"])
    table = capsys.readouterr().out
    expected = f"{as_markdown(read_rows(study))}\n{as_markdown(read_rows(study, WHOLE), WHOLE)}"
    assert table == (study / "worth.md").read_text() == expected
    assert "| all, stage1_pretrain | 2 | 0.450 | 0.400, 0.500 | 0.454 ± 0.071" in table and "nan" not in table
    main(["--out", str(study), "--only", "list", "--arms", "all", "--seeds", "0"])
    assert f"to do  held/{DATASET}/dataset.json" in capsys.readouterr().out
