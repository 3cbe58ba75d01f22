import pytest
from meddino_evaluation.cli import main
from meddino_evaluation.data.layouts import open_dataset
from meddino_evaluation.tasks.definition import load_task, task_names


def test_tasks__list_names_every_one_with_its_licence(capsys):
    assert main(["tasks", "list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said and load_task(name).licence in said for name in task_names())


@pytest.mark.parametrize("what", ["segment", "probe", "prompt", "classification", "detection", "study"])
def test_show__every_command_that_has_settings_shows_them(what, capsys):
    assert main(["show", what]) == 0
    assert "# " in capsys.readouterr().out


def test_tasks__a_shown_definition_is_read_as_the_same_one(capsys, tmp_path):
    assert main(["tasks", "show", "drive"]) == 0
    (tmp_path / "own.yaml").write_text(capsys.readouterr().out)
    assert load_task(tmp_path / "own.yaml") == load_task("drive")


def test_tasks__fake_and_prepare_say_what_comes_next(capsys, tmp_path):
    assert main(["tasks", "fake", "prostate_sites", "--out", str(tmp_path / "root")]) == 0
    assert main(["tasks", "prepare", "prostate_sites", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "data")]) == 0
    assert f"--test HK={tmp_path / 'data/sites/HK'}" in capsys.readouterr().out
    assert len(open_dataset(tmp_path / "data").cases) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fake", "isic2018"], "needs --out"),
        (["fake", "nothing", "--out", "x"], "no task 'nothing'"),
        (["prepare", "fgadr", "--root", ".", "--out", "x"], "only tasks with label maps"),
    ],
)
def test_tasks__wrong_input_exits_2(words, message, capsys):
    assert main(["tasks", *words]) == 2
    assert message in capsys.readouterr().err
