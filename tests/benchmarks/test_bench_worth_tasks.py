"""The tables of the other tasks: from planted scores, beside scikit-learn, and with seeds that belong together."""

import json
from pathlib import Path

import numpy as np
import pytest
from meddino_evaluation.study.config import StudyConfig
from sklearn.metrics import roc_auc_score

from meddino.core.config import load_config
from tests.benchmarks.bench_worth import RANDOM
from tests.benchmarks.bench_worth_tasks import (
    LABELLED,
    NAMES,
    as_markdown,
    checkpoint,
    labelled_parts,
    main,
    rows_of_auroc,
    rows_of_patients,
    slice_parts,
)


def test_parts__every_arm_has_its_place_and_the_main_ones_come_first(tmp_path):
    parts = list(labelled_parts(tmp_path, [0, 1]))
    names = [part.done.parent.name for part in parts[1:]]
    assert names == [*(f"n{count}_s{seed}" for seed in (0, 1) for count in LABELLED), "n4_s0-arms", "n4_s1-arms"]
    assert f"{NAMES[0]}={checkpoint(tmp_path, 'all', 'stage1_pretrain', 1)}" in parts[5].words
    assert parts[5].words.count("--model") == 2 and parts[-1].words.count("--model") == len(NAMES) - 1
    (study,) = slice_parts(tmp_path, tmp_path / "shared", [0, 1])
    config = load_config(StudyConfig, [study.words[4]], [], kind="evaluation")
    assert len(config.models) == 2 * (len(NAMES) + 1) and config.models[-1].endswith("@1")


def test_rows__seeds_that_belong_together_are_drawn_together():
    patients, seeds = np.linspace(0.3, 0.5, 12), np.array([[0.0], [0.2], [0.4]])
    tables = {"all_stage1": patients + seeds + 0.05, "no_ibot_stage1": patients + seeds, RANDOM: patients + seeds}
    tables["all_stage1"][:, ::2] += 0.01
    apart, together = (rows_of_patients("task", tables, paired) for paired in (False, True))
    for rows in (apart, together):
        assert [row.name for row in rows] == list(tables)
        assert rows[0].difference == pytest.approx(0.055)
        assert 0.05 < rows[0].patients_95[0] < 0.055 < rows[0].patients_95[1] < 0.06
        assert rows[0].p_holm == pytest.approx(2 * rows[0].p)
        assert np.isnan(rows[2].p_holm)
    assert apart[0].both_95[0] < -0.1 and together[0].both_95[0] > 0.05
    assert "| all_stage1 | 0.455, 0.655, 0.855 | 0.655 | +0.055 (" in as_markdown(together)


def test_rows__auroc_is_scikit_learns_mean_over_splits_and_seeds():
    rng = np.random.default_rng(0)
    patients, truth = [[f"p{number // 2}" for number in range(24)] for _ in range(2)], rng.integers(0, 2, (2, 24))

    def run(shift: float) -> list:
        positive = rng.normal(0, 1, (2, 24)) + shift * truth
        both = [np.stack([1 - one, one], axis=1) for one in 1 / (1 + np.exp(-positive))]
        return list(zip(patients, truth, both, strict=True))

    runs = {"all_stage1": [run(3.0), run(2.0)], RANDOM: [run(0.0), run(0.2), run(0.0)]}
    trained, fresh = rows_of_auroc("task", runs)
    for row, seeds in ((trained, runs["all_stage1"]), (fresh, runs[RANDOM])):
        for value, each in zip(row.each, seeds, strict=True):
            assert value == pytest.approx(np.mean([roc_auc_score(own, columns[:, 1]) for _, own, columns in each]))
    assert trained.difference == pytest.approx(np.mean(trained.each) - np.mean(fresh.each))
    assert 0 < trained.patients_95[0] < trained.difference < trained.patients_95[1] < 1
    assert trained.p < 0.05


def test_main__without_results_the_table_is_empty(tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    main(["--out", str(tmp_path), "--shared", str(tmp_path), "--only", "table"])
    assert capsys.readouterr().out == (tmp_path / "tasks" / "tasks.md").read_text() == ""


def test_main__reads_what_the_commands_write(tmp_path, capsys):
    def probe(name: str, right: int) -> None:
        folder: Path = tmp_path / "tasks" / "sarcoma" / name
        folder.mkdir(parents=True)
        rows = [f"probed,chosen,,0,0,p{number},tumour,{right + number},10,10" for number in range(8)]
        (folder / "cases.csv").write_text("\n".join(["model,readout,setting,fold,seed,patient,label,tp,fp,fn", *rows]) + "\n")
        (folder / "metrics.json").write_text(json.dumps({}))

    for seed in (0, 1):
        probe(f"all_stage1_s{seed}", 30 + seed)
        probe(f"random_s{seed}", 10)
    main(["--out", str(tmp_path), "--shared", str(tmp_path), "--only", "table"])
    table = capsys.readouterr().out
    assert "| sarcoma, patches of the tumour, F1 | each seed" in table and "| all_stage1 | 0.7" in table
