"""What a model is given: by its own contract where the data are its modality, scaled to its range where they are not."""

import numpy as np
import pytest
import torch
from meddino_evaluation.backbones.contract import ImageContract
from meddino_evaluation.data.dataset import modality_of
from meddino_evaluation.data.prepare import GridRule, prepare_volume
from meddino_evaluation.segmentation.networks.network import model_input

from meddino.data.content import ContentHash
from meddino.data.intensity import CTIntensity, ImageIntensity, MRIntensity
from meddino.data.model_input import normalise, normalise_channels
from meddino.volumes.geometry import Geometry
from meddino.volumes.orientation import AXIAL_LPS

GEOMETRY = Geometry((3, 8, 10), (3.0, 1.0, 1.0), (0.0, 0.0, 0.0), AXIAL_LPS)


def contract(own, given="ct") -> ImageContract:
    return ImageContract((), (), 8, 64, own, given)


@pytest.mark.parametrize(
    ("names", "modality"),
    [(("CT",), "ct"), (("T1",), "mr"), (("MRI",), "mr"), (("t1ce", "FLAIR"), "mr"), (("0",), "ct"), (("T1", "CT"), "ct")],
)
def test_modality_of__as_the_channels_are_called(names, modality):
    assert modality_of(names) == modality


def test_prepare_volume__mr_is_scaled_by_its_own_range_and_hashed_as_it_is_stored():
    stored = np.random.default_rng(0).gamma(2, 200, (3, 8, 10)).astype(np.float32)
    case = prepare_volume("a", stored[None], GEOMETRY, GridRule(), (stored > 300).astype(np.int32), modality="mr")
    low, high = np.percentile(stored, (0.5, 99.5))
    found = np.concatenate([case.image(z).numpy() for z in range(3)])
    turned = np.clip((stored - low) / (high - low), 0, 1)
    assert found == pytest.approx(turned, abs=1e-5)
    content = ContentHash((3, 8, 10), "float32")
    for plane in stored:
        content.add(plane)
    assert case.content_hash == content.hexdigest()


def test_prepare_volume__ct_stays_in_hu():
    stored = np.random.default_rng(0).integers(-1000, 1000, (3, 8, 10)).astype(np.int16)
    case = prepare_volume("a", stored[None], GEOMETRY, GridRule())
    assert torch.equal(case.image(1)[0], torch.from_numpy(stored[1].astype(np.float32)))


def test_model_input__mr_model_on_mr_is_its_contract():
    unit = torch.rand(2, 1, 8, 8)
    own = MRIntensity(mean=0.3, std=0.2)
    assert torch.allclose(model_input(unit, contract(own, "mr")), normalise(unit[:, 0], own))


def test_model_input__ct_model_on_mr_sees_it_stretched_over_its_window():
    unit = torch.tensor([[[[0.0, 0.5, 1.0]]]])
    own = CTIntensity()
    expected = normalise(torch.tensor([[[-1000.0, 0, 1000]]]), own)
    assert torch.allclose(model_input(unit, contract(own, "mr")), expected, atol=1e-5)


def test_model_input__mr_model_on_ct_sees_the_usual_window():
    hu = torch.tensor([[[[-3000.0, 0, 1000]]]])
    own = MRIntensity()
    expected = normalise(torch.tensor([[[0, 0.5, 1]]]), own)
    assert torch.allclose(model_input(hu, contract(own, "ct")), expected, atol=1e-5)


def test_from_unit__pictures_in_colour_and_grey():
    rgb, grey = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    own = ImageIntensity()
    assert torch.allclose(contract(own).from_unit(rgb), normalise_channels(rgb, own))
    assert torch.allclose(contract(own).from_unit(grey), normalise_channels(grey, own))


def test_mismatch__says_what_the_model_and_the_data_are():
    said = contract(CTIntensity()).mismatch("mr", "model m on Dataset904")
    assert all(words in said for words in ("model m on Dataset904", "CT in Hounsfield units", "MR in arbitrary units"))
    assert contract(CTIntensity()).mismatch("ct", "x") == "" == ImageContract().mismatch("mr", "x")
