from dataclasses import replace

import numpy as np
import pytest
import torch
from meddino_evaluation.adaptation.config import FeaturesConfig
from meddino_evaluation.adaptation.features import FeatureExtractor, Transform, make_transform, model_input
from meddino_evaluation.classification.datasets import load_dataset_config
from meddino_evaluation.classification.images import SliceStack

from meddino.core.device import find_machine
from meddino.core.errors import ConfigError, MedDINOError, VolumeError


def _extractor(backbone, cache, data="ct_contrast", **settings):
    config = FeaturesConfig(image_size_px=32, **settings)
    transform = make_transform(backbone, config, load_dataset_config(data))
    return FeatureExtractor(backbone, transform, config, cache, find_machine("cpu"))


@pytest.mark.parametrize("name", ["ct_contrast", "glioma_grading"])
def test_extractor__batch_size_does_not_change_features(fake_set, backbone, tmp_path, name):
    dataset = fake_set(name)
    one = _extractor(backbone, tmp_path / "1", name, batch_size=1)(dataset.cases)
    eight = _extractor(backbone, tmp_path / "8", name, batch_size=8)(dataset.cases)
    for a, b in zip(one.rows, eight.rows, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert one.widths == (128,) * 4


def test_extractor__features_are_the_models_own(fake_set, backbone, tmp_path):
    case = fake_set("ct_contrast").cases[0]
    table = _extractor(backbone, tmp_path)([case])
    from meddino_evaluation.classification.images import read_slices

    transform = Transform(32, "ct", None, None, 4)
    output = backbone.network(model_input(backbone, read_slices(case.source, "ct"), [0], transform))
    torch.testing.assert_close(table.bags()[0], output.cls_token, rtol=0, atol=1e-5)
    torch.testing.assert_close(table.rows[0][:, -128:], output.patch_tokens.mean(1), rtol=0, atol=1e-5)


def test_cache__second_time_nothing_is_computed(fake_set, backbone, tmp_path):
    cases = fake_set("ct_contrast").cases
    first = _extractor(backbone, tmp_path)
    table = first(cases[:6])
    assert first.computed == 6
    again = _extractor(backbone, tmp_path)
    more = again(cases)
    assert again.computed == len(cases) - 6
    assert torch.equal(more.rows[2], table.rows[2])


def test_cache__another_model_transform_or_content_is_another_entry(fake_set, backbone, tmp_path):
    from meddino_evaluation.backbones.load import load_backbone

    cases = fake_set("ct_contrast").cases[:2]
    _extractor(backbone, tmp_path)(cases)
    other_model = _extractor(load_backbone("random:vitnano8", seed=1), tmp_path)
    other_model(cases)
    assert other_model.computed == 2
    other_transform = _extractor(backbone, tmp_path, last_blocks=1)
    other_transform(cases)
    assert other_transform.computed == 2
    other_content = _extractor(backbone, tmp_path)
    other_content(fake_set("ct_contrast").cases[2:4])
    assert other_content.computed == 2
    backbone.contract = replace(backbone.contract, own=backbone.contract.own.model_copy(update={"hu_min": -500.0}))
    other_contract = _extractor(backbone, tmp_path)  # equal weights that see another window
    other_contract(cases)
    assert other_contract.computed == 2


def test_cache__a_damaged_file_is_computed_anew(fake_set, backbone, tmp_path):
    cases = fake_set("ct_contrast").cases[:2]
    table = _extractor(backbone, tmp_path)(cases)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    again = _extractor(backbone, tmp_path)
    torch.testing.assert_close(again(cases).rows[1], table.rows[1])
    assert again.computed == 2


def test_extractor__features_that_are_not_finite_are_named(fake_set, backbone, tmp_path):
    backbone.network.norm.weight.data[0] = float("nan")
    case = fake_set("ct_contrast").cases[0]
    with pytest.raises(MedDINOError, match="not finite") as error:
        _extractor(backbone, tmp_path)([case])
    assert case.name in str(error.value)


def test_extractor__frozen_is_frozen_and_a_change_is_found(fake_set, backbone, tmp_path):
    extractor = _extractor(backbone, tmp_path)
    extractor(fake_set("ct_contrast").cases[:3])
    extractor.check_frozen()
    backbone.network.norm.bias.data[0] += 1e-3
    with pytest.raises(RuntimeError, match="frozen backbone"):
        extractor.check_frozen()


def test_transform__size_slices_and_window(backbone):
    with pytest.raises(ConfigError, match="multiples of 8"):
        make_transform(backbone, FeaturesConfig(image_size_px=30), load_dataset_config("ct_contrast"))
    transform = Transform(32, "ct", None, 4, 1)
    assert transform.slice_numbers(3) == [0, 1, 2]
    assert transform.slice_numbers(8) == [1, 3, 5, 7]
    stack = SliceStack(np.full((1, 1, 32, 32), 3000, np.int16), "hu")
    clipped = model_input(backbone, stack, [0], transform)
    assert clipped.max().item() == pytest.approx((1000 - 65.108) / 178.017, rel=1e-5)


def test_extractor__several_slices_where_one_image_was_said(fake_set, backbone, tmp_path):
    case = fake_set("glioma_grading").cases[0]
    with pytest.raises(VolumeError, match="one image a case"):
        _extractor(backbone, tmp_path, "brain_mri")([case])
