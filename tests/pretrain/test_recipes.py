"""Every shipped recipe says only what differs, and means what it says."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from meddino_pretrain.build import check_views
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.plan import KEPT, KEPT_CHECKPOINTED, PlannedMachine, plan_run
from meddino_pretrain.run.initialization import read_init
from pydantic import BaseModel

from meddino.core.config import load_config, to_yaml
from meddino.core.errors import ConfigError
from meddino.models.registry import build_backbone

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs" / "pretrain").glob("*.yaml"))
PAPER = ("ct3m_vitb", "ct3m_vitl", "ct3m_vits")
# What the recipes say they run on: cards, and bytes of one.
SMALLEST_MACHINE = {**dict.fromkeys(PAPER, (2, 80e9)), "single_gpu": (1, 24e9)}


def leaves(value, above=()):
    if isinstance(value, dict):
        return [place for key, item in value.items() for place in leaves(item, (*above, key))]
    return [above]


def leaf_values(value, above=()):
    if isinstance(value, dict) and value:
        return {place: leaf for key, item in value.items() for place, leaf in leaf_values(item, (*above, key)).items()}
    return {above: value}


def as_dict(config: BaseModel):
    return config.model_dump(mode="json")


def test_recipes__all_are_there():
    assert {path.stem for path in RECIPES} >= {*PAPER, "single_gpu", "cpu_small", "smoke", "demo"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes__crops_divide_into_patches(path):
    config = load_config(PretrainConfig, [path])
    assert check_views(config).keys() == config.stages.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes__say_only_what_differs(path, tmp_path):
    whole, own = as_dict(load_config(PretrainConfig, [path])), yaml.safe_load(path.read_text())
    beside = tmp_path / path.name

    def means_the_same_without(place) -> bool:
        values = copy.deepcopy(own)
        *above, last = place
        section = values
        for key in above:
            section = section[key]
        del section[last]
        if "extends" in values:  # by its path: the copy lies elsewhere
            bases = [own["extends"]] if isinstance(own["extends"], str) else own["extends"]
            values["extends"] = [str(path.parent / f"{base}.yaml") for base in bases]
        beside.write_text(yaml.safe_dump(values, sort_keys=False))
        try:
            return as_dict(load_config(PretrainConfig, [beside])) == whole
        except ConfigError:
            return False

    assert not [".".join(place) for place in leaves(own) if means_the_same_without(place)]


@pytest.mark.parametrize("name", [*PAPER, "single_gpu"])
def test_recipes__from_scratch_only_what_the_overlay_says_differs(name):
    base, scratch = (
        leaf_values(as_dict(load_config(PretrainConfig, [one], kind="pretrain"))) for one in (name, f"{name}_scratch")
    )
    differing = {place for place in base.keys() | scratch.keys() if base.get(place) != scratch.get(place)}
    overlay = leaf_values(yaml.safe_load((RECIPES[0].parent / "overlays" / "scratch.yaml").read_text()))
    # Stages 2 and 3 take from stage 1 what they do not say themselves.
    assert {place[-1] for place in differing} == {place[-1] for place in overlay}
    assert all(scratch[place] == value for place, value in overlay.items())


@pytest.mark.parametrize("name", PAPER)
def test_recipes__the_paper_stages(name):
    stages = load_config(PretrainConfig, [name], kind="pretrain").stages
    assert [stage.steps for stage in stages.values()] == [100_000, 10_000, 10_000]
    assert [stage.schedule.lr for stage in stages.values()] == [2e-4, 5e-5, 2.5e-5]
    assert [stage.method.losses.gram_weight for stage in stages.values()] == [0, 2, 2]
    assert {stage.global_batch for stage in stages.values()} == {512}
    assert [size.weight for size in stages["stage3_highres"].method.crops.sizes] == [0.3, 0.3, 0.3, 0.05, 0.05]


def kept_bytes(backbone, images: int) -> int:
    """Bytes that a forward pass in bf16 keeps for its backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        backbone(torch.zeros(images, 3, 64, 64))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("checkpointing", "wanted"), [(False, KEPT), (True, KEPT_CHECKPOINTED)])
def test_recipes__what_a_token_keeps_is_what_the_arithmetic_says(checkpointing, wanted):
    backbone = build_backbone("vits16").train()
    if checkpointing:
        backbone.recompute_activations()
    few, many = (kept_bytes(backbone, images) for images in (2, 6))  # the difference: weights cast to bf16 are in both
    assert (many - few) / (4 * 21 * 384 * 12) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("name", SMALLEST_MACHINE)
def test_recipes__every_stage_fits_the_smallest_machine_it_names(name):
    cards, card_bytes = SMALLEST_MACHINE[name]
    config = load_config(PretrainConfig, [name], kind="pretrain")
    plans = plan_run(config, PlannedMachine(cards, card_bytes, None, True, "cards"))
    assert all(each.memory_bytes < 0.8 * card_bytes for each in plans), plans
    for stage in config.stages.values():
        assert stage.global_batch % (8 // cards * cards * stage.accumulation) == 0


def test_recipes__released_weights_have_to_be_given():
    config = load_config(PretrainConfig, ["ct3m_vitb"], kind="pretrain")
    with pytest.raises(ConfigError, match=r"give init\.weights=FILE"):
        read_init(config)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.stage2_gram.starts_from=stage3_highres", "before it"),
        ("stages.stage2_gram.method.gram_teacher.step=31", "step 31 of stage1_pretrain, which has 30 steps"),
        ("stages.stage2_gram.method.gram_teacher=null", "gram_teacher must be set"),
        ("stages.stage1_pretrain.schedul.lr=1", "schedul"),
        ("stages.stage1_pretrain.method.name=dinov4", "dinov3"),
        (
            "stages.stage1_pretrain.method.losses.dino_wieght=1",
            r"stages\.stage1_pretrain\.method\.losses\.dino_wieght.*dino_weight",
        ),
        ("optimizer.clip_grad_norm=-1", "clip_grad_norm"),
        ("stages.stage1.steps=5", "no 'stage1' in stages; stages: stage1_pretrain, stage2_gram, stage3_highres"),
    ],
)
def test_recipes__a_wrong_key_is_named(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(PretrainConfig, ["smoke"], [override], kind="pretrain")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes__what_a_run_writes_down_reads_back(path, tmp_path):
    config = load_config(PretrainConfig, [path])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(PretrainConfig, [tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["snapshot_steps=[3,-1]"], r"'stages\.stage1_pretrain\.snapshot_steps\.1' is -1: .*greater than or equal to 1"),
        (["snapshot_steps=[0]"], r"snapshot_steps\.0' is 0"),
        (["gram=0"], "asks for step 0 of stage1_pretrain, which has 30 steps"),
        (["gram=-1"], "asks for step -1 of stage1_pretrain, which has 30 steps"),
    ],
)
def test_recipes__a_snapshot_that_cannot_be_is_refused(overrides, words):
    gram = "stages.stage2_gram.method.gram_teacher.step"
    given = [text.replace("gram", gram) if "gram" in text else f"stages.stage1_pretrain.{text}" for text in overrides]
    with pytest.raises(ConfigError, match=words):
        load_config(PretrainConfig, ["smoke"], given, kind="pretrain")


def test_recipes__a_shortened_stage_keeps_the_snapshots_that_it_reaches():
    config = load_config(PretrainConfig, ["cpu_small"], ["stages.stage1_pretrain.steps=1200"], kind="pretrain")
    assert config.snapshots("stage1_pretrain") == {500, 1000}
    assert config.stages["stage1_pretrain"].snapshots_beyond == [1500, 2000, 2500, 3000]
    given = ["stages.stage1_pretrain.snapshot_steps=[3,99]", "stages.stage2_gram.method.gram_teacher.step=auto"]
    chosen = load_config(PretrainConfig, ["smoke"], given, kind="pretrain")
    assert chosen.snapshots("stage1_pretrain") >= {3, 30} and 99 not in chosen.snapshots("stage1_pretrain")


@pytest.mark.parametrize("betas", ["[0.9,1.0]", "[-0.1,0.9]"])
def test_recipes__betas_that_adamw_refuses_are_named(betas):
    with pytest.raises(ConfigError, match=r"'optimizer\.betas\.[01]' is (1\.0|-0\.1): "):
        load_config(PretrainConfig, ["smoke"], [f"optimizer.betas={betas}"], kind="pretrain")
