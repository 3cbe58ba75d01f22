from typing import Annotated

import pytest
from pydantic import Field

from meddino.core.config import StrictConfig, differences, find_config, load_config, to_yaml
from meddino.core.errors import ConfigError


class Optimizer(StrictConfig):
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


class Recipe(StrictConfig):
    seed: int = 0
    name: str
    optimizer: Optimizer = Optimizer()
    head: Optimizer | None = None


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\noptimizer: {lr: 2e-4}\n")
    return path


def test_load_config__merges_files_left_to_right_then_overrides(recipe_file, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("optimizer: {betas: [0.8, 0.9]}\nseed: 3\n")
    config = load_config(Recipe, [recipe_file, second], ["seed=4", "optimizer.lr=1e-2"])
    assert config == Recipe(name="a", seed=4, optimizer=Optimizer(lr=1e-2, betas=(0.8, 0.9)))


def test_load_config__reads_back_what_to_yaml_writes(recipe_file, tmp_path):
    config = load_config(Recipe, [recipe_file], ["head.lr=3e-5"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(Recipe, [copy]) == config


def test_load_config__names_all_wrong_keys_at_once(recipe_file):
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, [recipe_file], ["optimizer.lrr=1", "seeds=2", "optimizer.lr=-1", "head.betaz=[1,2]"])
    message = str(caught.value)
    assert "4 problems" in message
    assert "unknown key 'optimizer.lrr'; did you mean 'lr'?" in message
    assert "unknown key 'seeds'; did you mean 'seed'?" in message
    assert "'optimizer.lr' is -1" in message
    assert "did you mean 'betas'?" in message


@pytest.mark.parametrize(
    ("override", "part"),
    [("seed", "write key=value"), ("seed='3'", "'seed' is '3'"), ("seed=1.5", "'seed' is 1.5"), ("name=[1", "name=[1")],
)
def test_load_config__refuses_a_wrong_override(recipe_file, override, part):
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, [recipe_file], [override])
    assert part in str(caught.value)


def test_load_config__missing_key_and_broken_yaml(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="'name' is missing"):
        load_config(Recipe, [empty])
    empty.write_text("seed: [1\n")
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_config(Recipe, [empty])
    empty.write_text("- 1\n")
    with pytest.raises(ConfigError, match="key: value"):
        load_config(Recipe, [empty])


def test_find_config__lists_the_shipped_names():
    with pytest.raises(ConfigError, match="no config file 'nonsense'"):
        find_config("nonsense", "pretrain")


def test_differences__names_each_key():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == ["b.c: 2 -> 3", "d: (absent) -> 4"]
