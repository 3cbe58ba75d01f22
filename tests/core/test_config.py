from typing import Annotated

import pytest
from pydantic import Field

from meddino.core.config import StrictConfig, differences, find_config, load_config, merge_config, to_yaml
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
    [
        ("seed", "write key=value"),
        ("seed='3'", "'seed' is '3'"),
        ("seed=1.5", "'seed' is 1.5"),
        ("name=[1", "name=[1"),
        ("name=!!binary aGk=", "bytes"),
    ],
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


class Stage(StrictConfig):
    steps: int
    optimizer: Optimizer = Optimizer()


class Staged(StrictConfig):
    seed: int = 0
    stages: dict[str, Stage]


STAGED = "stages:\n  one: {steps: 3, optimizer: {lr: 0.5}}\n  two: {like: one, steps: 4}\n  three: {like: two}\n"


@pytest.fixture
def staged(tmp_path):
    (tmp_path / "base.yaml").write_text(STAGED)
    return tmp_path


def test_extends__says_only_what_differs(staged):
    (staged / "child.yaml").write_text("extends: base\nseed: 2\n")
    grandchild = staged / "grandchild.yaml"
    grandchild.write_text("extends: child.yaml\nstages: {one: {optimizer: {lr: 0.25}}}\n")
    config = load_config(Staged, [grandchild])
    assert config.seed == 2
    assert {name: (stage.steps, stage.optimizer.lr) for name, stage in config.stages.items()} == {
        "one": (3, 0.25),
        "two": (4, 0.25),
        "three": (4, 0.25),
    }


def test_extends__of_several_a_later_one_lies_over_an_earlier_one(staged):
    (staged / "overlay.yaml").write_text("seed: 7\nstages: {one: {optimizer: {lr: 0.25}}}\n")
    child = staged / "child.yaml"
    child.write_text("extends: [base, overlay]\n")
    one, base = load_config(Staged, [child]), load_config(Staged, [staged / "base.yaml"])
    assert one.seed == 7 and one.stages["one"].optimizer.lr == 0.25
    assert one.stages["one"].optimizer.betas == base.stages["one"].optimizer.betas
    child.write_text("extends: [overlay, base]\n")
    assert load_config(Staged, [child]).stages["one"].optimizer.lr == base.stages["one"].optimizer.lr


def test_like__an_override_changes_the_one_key_it_names(staged):
    stages = load_config(Staged, [staged / "base.yaml"], ["stages.one.steps=9", "stages.two.optimizer.lr=0.125"]).stages
    assert [(stage.steps, stage.optimizer.lr) for stage in stages.values()] == [(9, 0.5), (4, 0.125), (4, 0.5)]


def test_merge_config__knows_where_each_value_was_said(staged):
    (staged / "child.yaml").write_text("extends: base\nstages: {two: {optimizer: {betas: [0.5, 0.5]}}}\n")
    origins = merge_config(Staged, [staged / "child.yaml"], ["seed=3"]).origins
    assert origins["seed"] == "seed=3"
    assert origins["stages.two.optimizer.betas"] == "child"
    assert origins["stages.three.steps"] == "base, like two"
    assert origins["stages.three.optimizer.lr"] == "base, like two"
    assert origins["stages.three.optimizer.betas"] == "child, like two"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("extends: child\n", ["extends goes round: child -> child"]),
        ("extends: round\n", ["extends goes round: child -> round -> child"]),
        ("extends: nonsense\n", ["child.yaml", "extends", "'nonsense'"]),
        ("extends: {base: 1}\n", ["extends is {'base': 1}"]),
        ("extends: [base, 3]\n", ["extends is ['base', 3]"]),
        ("extends: [base, nonsense]\n", ["child.yaml", "extends", "'nonsense'"]),
        ("stages: {one: {like: four, steps: 1}, two: {steps: 1}}\n", ["'stages.one.like' is 'four'", "two"]),
        ("stages: {one: {like: two}, two: {like: one}}\n", ["like goes round: one -> two -> one"]),
    ],
)
def test_extends_and_like__wrong_names_are_one_line(staged, text, parts):
    (staged / "child.yaml").write_text(text)
    (staged / "round.yaml").write_text("extends: child\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Staged, [staged / "child.yaml"])
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize("override", ["stages.on.steps=1", "stages.on={steps: 1}"])
def test_load_config__a_misspelt_section_is_no_new_one(staged, override):
    with pytest.raises(ConfigError, match="no 'on' in stages; stages: one, two, three"):
        load_config(Staged, [staged / "base.yaml"], [override])
