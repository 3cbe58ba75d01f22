"""The Gram teacher is the snapshot with the best patches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.methods.dinov3.config import GramChoiceConfig
from meddino_pretrain.methods.dinov3.gram_choice import choose_gram_teacher
from meddino_pretrain.monitoring.feature_metrics import snapshot_scores
from meddino_pretrain.monitoring.fixed_slices import fixed_slices

from meddino.core.device import find_machine
from meddino.core.errors import CheckpointError
from meddino.data.intensity import CTIntensity
from meddino.models.registry import build_backbone

CONFIG = GramChoiceConfig()


def test_choose_gram_teacher__planted_degradation_leads_to_the_snapshot_before_it(make_corpus):
    fixed = fixed_slices(make_corpus(count=16), Intensities((CTIntensity(),)), 12, 64)
    generator = torch.Generator().manual_seed(0)
    good = build_backbone("vitnano8").eval()
    weight = good.patch_embed.proj.weight
    coarse = torch.randn(weight.shape[0], 1, 2, 2, generator=generator)
    anatomy = F.interpolate(coarse, size=(8, 8), mode="bilinear").expand_as(weight)
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    noise = torch.randn(weight.shape[0], 1, 1, 1, generator=generator) * (1.0 - 2 * ((x + y) % 2))
    scores = {}
    # Filters that see coarse anatomy; as training goes wrong, more and more of them sees the noise of a single slice.
    for step, share in {100: 40.0, 200: 10.0, 300: 0.0, 400: 10.0, 500: 40.0}.items():
        snapshot = copy.deepcopy(good)
        with torch.no_grad():
            snapshot.patch_embed.proj.weight.copy_(0.05 * (anatomy + share * noise))
        scores[step] = snapshot_scores(snapshot, fixed, find_machine("cpu"))
    choice = choose_gram_teacher(scores, CONFIG)
    assert choice.step == 300 and choice.degraded and choice.action == "run"
    assert choice.message.startswith("patch consistency fell from") and "the teacher of step 300 anchors" in choice.message
    assert list(choice.curve) == [100, 200, 300, 400, 500]


@pytest.mark.parametrize(("action", "words"), [("run", "runs all the same"), ("light", "runs lightly"), ("skip", "is skipped")])
def test_choose_gram_teacher__no_degradation_is_said_and_the_config_decides(action, words):
    scores = {step: torch.full((8,), 0.7 + step / 1000) for step in (10, 20, 30)}
    choice = choose_gram_teacher(scores, GramChoiceConfig(if_not_degraded=action))
    assert choice.step == 30 and not choice.degraded and choice.action == action
    assert "did not fall" in choice.message and words in choice.message


def test_choose_gram_teacher__a_fall_within_the_spread_of_slices_is_none():
    noise = torch.tensor([0.1, -0.1, 0.08, -0.08, 0.12, -0.1])
    scores = {10: torch.full((6,), 0.8) + noise, 20: torch.full((6,), 0.79)}
    assert not choose_gram_teacher(scores, CONFIG).degraded
    scores[20] = torch.full((6,), 0.79) + noise  # the same fall on every slice
    assert choose_gram_teacher(scores, CONFIG).degraded


def test_choose_gram_teacher__one_snapshot_and_none():
    assert choose_gram_teacher({7: torch.tensor([0.6])}, CONFIG).step == 7
    with pytest.raises(CheckpointError, match="kept no snapshots"):
        choose_gram_teacher({}, CONFIG)
