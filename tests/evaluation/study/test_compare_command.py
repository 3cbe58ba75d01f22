import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from meddino_evaluation.cli import main
from meddino_evaluation.data.layouts import open_dataset
from meddino_evaluation.data.run_folder import write_settings
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.study.compare_command import check_test_sets

from meddino.core.errors import ConfigError
from meddino.core.files import write_json
from tests.evaluation.segmentation.conftest import write_dataset
from tests.evaluation.segmentation.test_compare import variant


def write_run(folder: Path, dice: np.ndarray, data: str = "d") -> Path:
    """Write a finished run of `segment` as far as `compare` reads it."""
    made = variant("m", dice, data=data)
    write_settings(folder, SegmentConfig())
    write_json(folder / "metrics.json", made.metrics)
    columns = list(made.rows[0])
    lines = [",".join(columns), *(",".join(str(row[column]) for column in columns) for row in made.rows)]
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_compare__a_test_set_is_the_one_that_the_run_was_tested_on(tmp_path):
    site, other = write_dataset(tmp_path / "site"), write_dataset(tmp_path / "other", 5)
    dataset = open_dataset(site)
    run = write_run(tmp_path / "run", np.full((1, 4), 0.5))
    write_run(run / "external" / "A", np.full((1, 4), 0.4), dataset.data_hash(dataset.all_cases))
    finished = [replace(variant("m", np.full((1, 4), 0.5)), folder=run)]
    check_test_sets(finished, {"A": site})
    with pytest.raises(ConfigError, match="was tested on other data under the name A"):
        check_test_sets(finished, {"A": other})
    with pytest.raises(ConfigError, match="no such folder"):
        check_test_sets(finished, {"A": tmp_path / "nothing"})
    words = ["compare", f"--results=m={run}", "--out", str(tmp_path / "out"), "--test"]
    assert main([*words, f"A={tmp_path / 'nothing'}"]) == 2
    assert main([*words, f"A={site}"]) == 0


def test_compare__writes_over_its_own_files_alone(tmp_path, capsys):
    run = write_run(tmp_path / "run", np.random.default_rng(0).uniform(size=(2, 8)))
    (run / "report.html").write_text("of segment")
    words = ["compare", f"--results=a={run}", f"--results=b={run}", "--out"]
    assert main([*words, str(run)]) == 2
    assert "holds 'report.html', and no comparison was begun there" in capsys.readouterr().err
    assert (run / "report.html").read_text() == "of segment"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "comparison.json").write_text('{"mine": true}')
    assert main([*words, str(mine)]) == 2
    for _ in range(2):  # the same command again goes on
        assert main([*words, str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/comparison.json").read_text())["notes"] == [
        f"{name}: no splits.json tells from which cases its networks learned" for name in "ab"
    ]
    assert "no splits.json tells" in capsys.readouterr().err
