"""Every shipped recipe is complete, says where each value comes from, and means what it says."""

from pathlib import Path

import pytest
import yaml
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.origins import read_init
from pydantic import BaseModel

from meddino.core.config import load_config
from meddino.core.errors import ConfigError
from meddino.models.registry import backbone_config

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs" / "pretrain").glob("*.yaml"))
PAPER = ("ct3m_vitb", "ct3m_vitl", "ct3m_vits")


def leaves(value, prefix=""):
    if isinstance(value, dict):
        return {path for key, item in value.items() for path in leaves(item, f"{prefix}.{key}")} or {prefix}
    return {prefix}


def as_dict(config: BaseModel):
    return config.model_dump(mode="json")


def test_recipes__all_are_there():
    assert {path.stem for path in RECIPES} >= {*PAPER, "single_gpu", "cpu_small", "smoke", "demo"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes__complete(path):
    config = load_config(PretrainConfig, [path])
    assert leaves(yaml.safe_load(path.read_text())) == leaves(as_dict(config)), "a key is left to its default"
    patch_size = backbone_config(config.backbone.name, **config.backbone.changes).patch_size
    for stage in config.stages.values():
        stage.crops.check_patch_size(patch_size)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes__every_value_has_its_comment(path):
    lines = path.read_text().splitlines()
    bare = [
        line
        for number, line in enumerate(lines)
        if line.strip() and not line.strip().startswith(("#", "- {")) and not line.rstrip().endswith(":") and "#" not in line
        and not lines[number - 1].strip().startswith("#")
    ]  # fmt: skip
    assert not bare


@pytest.mark.parametrize("name", PAPER)
def test_recipes__the_paper_stages(name):
    stages = load_config(PretrainConfig, [name], kind="pretrain").stages
    assert [stage.steps for stage in stages.values()] == [100_000, 10_000, 10_000]
    assert [stage.schedule.lr for stage in stages.values()] == [2e-4, 5e-5, 2.5e-5]
    assert [stage.losses.gram_weight for stage in stages.values()] == [0, 2, 2]
    assert {stage.global_batch for stage in stages.values()} == {512}
    assert [size.weight for size in stages["stage3_highres"].crops.sizes] == [0.3, 0.3, 0.3, 0.05, 0.05]


def test_recipes__released_weights_have_to_be_given():
    config = load_config(PretrainConfig, ["ct3m_vitb"], kind="pretrain")
    with pytest.raises(ConfigError, match=r"give init\.weights=FILE"):
        read_init(config.init, backbone_config(config.backbone.name, **config.backbone.changes))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.stage2_gram.starts_from=stage3_highres", "no stage before it"),
        ("stages.stage2_gram.gram_teacher.step=31", "beyond the 30 steps"),
        ("stages.stage2_gram.gram_teacher=null", "gram_teacher must be set"),
        ("stages.stage1_pretrain.schedul.lr=1", "schedul"),
        ("optimizer.clip_grad_norm=-1", "clip_grad_norm"),
    ],
)
def test_recipes__a_wrong_key_is_named(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(PretrainConfig, ["smoke"], [override], kind="pretrain")
