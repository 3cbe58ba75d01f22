import pytest
from meddino_pretrain.cli import main
from meddino_pretrain.config import PretrainConfig

from meddino.core.config import load_config, to_yaml


@pytest.fixture
def shown(capsys):
    """What `meddino-pretrain show ...` prints."""

    def show(*arguments: str) -> str:
        assert main(["show", *arguments]) == 0
        return capsys.readouterr().out

    return show


def test_show__prints_a_recipe_that_means_the_same(shown, tmp_path):
    (tmp_path / "shown.yaml").write_text(shown("ct3m_vitb", "init.weights=timm:a b@c"))
    again = load_config(PretrainConfig, [tmp_path / "shown.yaml"])
    assert again == load_config(PretrainConfig, ["ct3m_vitb"], ["init.weights=timm:a b@c"], kind="pretrain")


def test_show__every_value_says_what_it_is_and_who_said_it(shown):
    lines = shown("smoke", "seed=4").splitlines()
    values = [line for line in lines if not line.endswith(":") and not line.lstrip().startswith("- {")]
    assert all("  # " in line for line in values)
    assert next(line for line in lines if line.startswith("seed:")) == "seed: 4  # [seed=4] Seed of everything random."
    keep_last = next(line for line in lines if line.strip().startswith("keep_last:"))
    assert "2  # [smoke]" in keep_last and "ours: 3" in keep_last


def test_show__against_a_recipe_or_a_run_names_what_differs(shown, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(PretrainConfig, ["smoke"], kind="pretrain")))
    assert shown("smoke", "seed=4", "--against", str(tmp_path)) == "seed: 0 -> 4\n"
    assert "backbone.name: vitb16 -> vitl16" in shown("ct3m_vitl", "--against", "ct3m_vitb").splitlines()


def test_show__names_the_stages(shown):
    assert shown("smoke", "--stages").split() == ["stage1_pretrain", "stage2_gram", "stage3_highres"]


def test_show__a_wrong_recipe_is_one_line(capsys):
    assert main(["show", "smok"]) == 2
    assert "no config file 'smok'" in capsys.readouterr().err
