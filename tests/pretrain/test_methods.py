"""The method is a room: nothing outside it names its parts, and its schema costs no torch."""

import re
import subprocess
import sys
from pathlib import Path

import meddino_pretrain
import pytest
import torch
from meddino_pretrain.methods import METHODS
from meddino_pretrain.methods.base import Method, ProbeOutput, StageSetting, backbones_in
from torch import nn

from meddino.core.device import find_machine
from meddino.models.registry import build_backbone
from tests.pretrain.toy_method import Toy, ToyConfig

PARTS_OF_DINOV3 = re.compile(r"global_crop|local_crop|prototype|gram|ibot|teacher_temperature", re.IGNORECASE)
SOURCE = Path(meddino_pretrain.__file__).parent


def test_methods__nothing_outside_dinov3_names_its_parts():
    rooms = [SOURCE / "methods" / row.config.split(".")[2] for row in METHODS.values()]  # other methods have parts of their own
    files = [file for file in SOURCE.rglob("*.py") if not any(file.is_relative_to(room) for room in rooms)]
    named = [
        f"{file.relative_to(SOURCE)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if PARTS_OF_DINOV3.search(line)
    ]
    assert len(files) > 40 and not named, named


@pytest.mark.parametrize("name", METHODS)
def test_methods__a_config_names_its_row_and_imports_no_torch(name):
    config = METHODS[name].config_class()
    assert config.model_fields["name"].default == name
    module = METHODS[name].config.split(":")[0]
    code = f"import sys, {module}; print([each for each in ('torch', 'numpy', 'jaxtyping') if each in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.fixture
def toy() -> Toy:
    from meddino_pretrain.data.sampler import BatchShare

    return Toy.build(ToyConfig(), build_backbone("vitnano8"), StageSetting(4, 0, BatchShare(4), find_machine("cpu")))


def test_method__what_a_new_one_gets_for_nothing(toy):
    assert list(toy.trainable()) == ["backbone", "projector"]
    assert backbones_in(toy.networks()) == {"model.backbone": toy.export()}
    assert toy.scheduled(3) == {} == toy.lr_multipliers(3) == toy.observations()
    assert isinstance(toy, Method) and ToyConfig().kept_backbone is None and ToyConfig().after_choice("skip") is None


def test_method__is_probed_in_evaluation_mode_and_trains_on(toy):
    toy.model.train()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        seen = toy.probe(images)
        assert isinstance(seen, ProbeOutput) and torch.equal(seen.cls_token, toy.probe(images).cls_token)
    assert seen.patch_map is not None and seen.patch_map.shape == (2, 128, 4, 4) and toy.model.backbone.training


def test_method__backbones_are_found_wherever_they_lie():
    inner = build_backbone("vitnano8")
    found = backbones_in({"one": nn.ModuleDict({"deep": nn.ModuleDict({"er": inner})}), "two": inner})
    assert found == {"one.deep.er": inner, "two": inner}
