"""The comparison of methods says what it means: every method's recipe is there, at one size."""

import pytest

from tests.benchmarks.bench_methods import BATCH, METHODS, SWITCHES, recipe_of


@pytest.mark.parametrize("name", [*METHODS, *SWITCHES])
def test_recipe__one_backbone_one_batch_every_modality(name):
    config = recipe_of(name, 3)
    stage = next(iter(config.stages.values()))
    assert (config.seed, config.backbone.name, stage.global_batch, config.init.weights) == (3, "vitnano8", BATCH, "scratch")
    assert {contract.modality for contract in config.contracts} == {"ct", "mr", "image"}
