import numpy as np
import pytest
from meddino_evaluation.data.prepare import GridRule, PreparedCase, prepare_volume
from meddino_evaluation.segmentation.config import LabelsConfig, TrainingConfig
from meddino_evaluation.segmentation.training.samples import CropSampler, choose_slices

from meddino.core.config import check_config
from meddino.volumes.geometry import geometry_from_xyz


def case(name: str, labels_by_slice: list[set[int]]) -> PreparedCase:
    """Slices of 40 x 40 pixels, each with a block of every label it is to hold."""
    label = np.zeros((len(labels_by_slice), 40, 40), dtype=np.int32)
    for z, values in enumerate(labels_by_slice):
        for value in values:
            label[z, 4 * value : 4 * value + 4, 4 * value : 4 * value + 4] = value
    geometry = geometry_from_xyz((40, 40, len(label)), (1.0, 1.0, 3.0), (0.0, 0.0, 0.0), tuple(np.eye(3).reshape(-1).tolist()))
    image = np.arange(label.size, dtype=np.int16).reshape(1, *label.shape) % 1000 - 500
    return prepare_volume(name, image, geometry, GridRule(), label)


COMMON, RARE = {1}, {2}
CASES = [case("a", [COMMON] * 10 + [set()] * 6), case("b", [COMMON] * 8 + [RARE, RARE])]


def test_choose_slices__balanced_adds_what_was_seen_least_and_few_are_the_first_of_more():
    few = choose_slices(CASES, LabelsConfig(train_slices=4), seed=3)
    held = [CASES[ref.case].present[ref.z] for ref in few]
    assert [sum(value in present for present in held) for value in (1, 2)] == [2, 2]
    assert choose_slices(CASES, LabelsConfig(train_slices=8), seed=3)[:4] == few
    random = choose_slices(CASES, LabelsConfig(train_slices=4, slice_choice="random"), seed=3)
    assert choose_slices(CASES, LabelsConfig(train_slices=8, slice_choice="random"), seed=3)[:4] == random
    assert len({tuple(choose_slices(CASES, LabelsConfig(train_slices=4), seed=seed)) for seed in range(10)}) > 1
    assert len(choose_slices(CASES, LabelsConfig(), seed=3)) == 26


def drawn(sampling: str, share: float) -> np.ndarray:
    """Which labels the crops of 200 steps hold [crops, labels]."""
    config = {"steps": 1, "batch_size": 4, "crop_px": 8, "sampling": sampling, "foreground_oversampling": share}
    sampler = CropSampler(
        CASES,
        choose_slices(CASES, LabelsConfig(), 0),
        check_config(TrainingConfig, config, "test"),
        0,
        (-1000.0, 1000.0),
        seed=1,
    )
    labels = np.concatenate([sampler.batch(step).labels for step in range(200)])
    return np.stack([(labels == value).any(axis=(1, 2)) for value in (1, 2)], axis=1)


def test_crops__the_share_asked_for_holds_a_label():
    for share in (0.5, 1.0):
        assert drawn("nnunet", share).any(axis=1).reshape(200, 4)[:, 4 - round(4 * share) :].all()
    assert drawn("nnunet", 0.0).any(axis=1).mean() < 0.3  # labels cover a hundredth of a slice


@pytest.mark.parametrize(("sampling", "rare"), [("nnunet", 0.1), ("balanced", 0.5)])
def test_crops__balanced_draws_a_label_first(sampling, rare):
    share = drawn(sampling, 1.0)[:, 1].mean()  # two of twenty labelled slices hold the rare label
    assert abs(share - rare) < 0.06
