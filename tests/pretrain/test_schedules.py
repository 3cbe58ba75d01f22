"""Schedules against literal values."""

import pytest
from meddino_pretrain.schedules import ScheduleConfig, Schedules, cosine, linear
from pydantic import ValidationError


def config(**changes: object) -> ScheduleConfig:
    values = {
        "lr": 1e-3,
        "warmup_steps": 4,
        "lr_shape": "constant",
        "lr_end": None,
        "weight_decay": 0.04,
        "weight_decay_end": 0.04,
        "freeze_backbone_steps": 1,
        "backbone_lr_multiplier": 0.5,
    }
    return ScheduleConfig(**(values | changes))


def test_schedules__warmup_then_constant():
    schedules = Schedules(config(), 10)
    assert [schedules.at(step).lr for step in range(6)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_schedules__linear_and_cosine_end():
    falling = Schedules(config(lr_shape="linear", lr_end=0.0, warmup_steps=0), 10)
    assert [falling.at(step).lr for step in (0, 5, 9)] == pytest.approx([1e-3, 5e-4, 1e-4])
    halved = Schedules(config(lr_shape="halving", lr_end=1.25e-4, warmup_steps=0), 8)
    assert [halved.at(step).lr for step in range(8)] == pytest.approx(
        [value for value in (1e-3, 5e-4, 2.5e-4, 1.25e-4) for _ in "ab"]
    )
    curved = Schedules(config(lr_shape="cosine", lr_end=2e-4, warmup_steps=0), 10)
    assert [curved.at(step).lr for step in (0, 5)] == pytest.approx([1e-3, 6e-4])


def test_schedules__momentum_by_cosine_and_temperature_by_line():
    assert [cosine(0.9, 1.0, step / 10) for step in (0, 5, 10)] == pytest.approx([0.9, 0.95, 1.0])
    assert [linear(0.04, 0.07, step, 3) for step in range(5)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])


def test_schedules__what_is_held_still_and_what_the_method_says():
    schedules = Schedules(config(), 10)
    assert [schedules.at(step).lr_multipliers["backbone"] for step in range(3)] == [0, 0.5, 0.5]
    values = schedules.at(2, {"momentum": 0.7}, {"head": 0.25})
    assert values.own == {"momentum": 0.7} and values.lr_multipliers == {"backbone": 0.5, "head": 0.25}


@pytest.mark.parametrize("changes", [{"lr_end": 1e-4}, {"lr_shape": "linear"}, {"lr_shape": "halving", "lr_end": 0.0}])
def test_schedules__end_belongs_to_a_falling_shape(changes):
    with pytest.raises(ValidationError, match="lr_end"):
        config(**changes)
