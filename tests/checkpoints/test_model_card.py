"""MODEL_CARD.md says all that a person needs before using the weights."""

import pytest

from meddino.checkpoints.export.model_card import DINOV3_LICENCE_URL, model_card
from meddino.checkpoints.export.model_folder import ModelConfig
from meddino.core.config import check_config

CONTENT = {
    "architecture": {"embed_dim": 768, "depth": 12, "num_heads": 12, "name": "vitb16"},
    "input_contract": {"hu_min": -900.0, "hu_max": 1100.0, "mean": 65.108, "std": 178.017, "channels": 3},
    "resolutions_px_seen": [256, 512],
    "lineage": {
        "corpus_hash": "c0ffee",
        "data": [
            {"dataset": "AMOS22", "licence": "CC BY 4.0", "volumes": 500},
            {"dataset": "KiTS23", "licence": "CC BY-NC-SA 4.0", "volumes": 1489},
        ],
        "audited_against": ["BTCV", "WORD (2 overlaps)"],
        "stages": [{"name": "stage1_pretrain", "steps": 100000}, {"name": "stage2_gram", "steps": 10000}],
        "parent": {"name": "dinov3_vitb16.pth", "sha256": "ab12", "licence": "DINOv3 License"},
        "licence": "DINOv3 License",
    },
    "weights": {"sha256": "f00d", "dtype": "float32", "parameters": 85660416, "role": "teacher"},
    "metrics": {"AMOS22 Dice": 0.87},
    "command": "meddino-export RUN_OR_CHECKPOINT --out MODEL --to safetensors",
    "meddino_version": "9.8.7",
}
SAYS = {
    "input contract": ["[-900, 1100]", "65.108", "178.017", "3 channels", "multiples of 16 px", "256, 512"],
    "corpus": ["c0ffee"],
    "data sets with licences": ["AMOS22: licence CC BY 4.0, 500 volumes", "KiTS23: licence CC BY-NC-SA 4.0, 1,489 volumes"],
    "audit": ["audited against: BTCV, WORD (2 overlaps)"],
    "stages and steps": ["stage1_pretrain: 100,000 steps", "stage2_gram: 10,000 steps"],
    "parent and its licence": ["dinov3_vitb16.pth (DINOv3 License, SHA-256 `ab12`)", "travels along", DINOV3_LICENCE_URL],
    "licence": ["license_name: DINOv3 License", "these weights: DINOv3 License"],
    "figures": ["AMOS22 Dice: 0.87"],
    "how it was made": ["meddino-export RUN_OR_CHECKPOINT --out MODEL --to safetensors", "MedDINO 9.8.7"],
    "weights": ["85,660,416 parameters", "float32", "f00d", "teacher"],
    "use": ["meddino.load(", "not a medical device"],
}


@pytest.mark.parametrize("what", SAYS)
def test_card__says(what):
    card = model_card(check_config(ModelConfig, CONTENT, where="test"))
    assert [text for text in SAYS[what] if text not in card] == []


def test_card__from_scratch_is_ours_and_says_what_was_not_recorded():
    bare = {**CONTENT, "lineage": {}, "metrics": {}, "resolutions_px_seen": []}
    card = model_card(check_config(ModelConfig, bare, where="test"))
    for text in (
        "license: apache-2.0",
        "started from random weights",
        "corpus: not recorded",
        "audited against no test set: check for overlap before you evaluate",
        "none were given at export",
        "crops in training [px]: not recorded",
    ):
        assert text in card, text
    assert DINOV3_LICENCE_URL not in card
