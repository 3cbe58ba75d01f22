"""Fake data sets, a small backbone and settings that take seconds."""

import pytest
from meddino_evaluation.adaptation.config import (
    FeaturesConfig,
    FewShotConfig,
    FinetuneConfig,
    LinearConfig,
    LogisticConfig,
    MlpConfig,
)
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.classification.config import ClassificationConfig, SplitConfig, StatisticsConfig
from meddino_evaluation.classification.datasets import load_dataset_config, open_dataset
from meddino_evaluation.classification.fake_data import make_fake


@pytest.fixture(scope="session")
def fake_set(tmp_path_factory):
    made = {}

    def make(name, patients=6):
        if (name, patients) not in made:
            root = tmp_path_factory.mktemp(name)
            make_fake(name, root, patients)
            made[name, patients] = root
        return open_dataset(load_dataset_config(name), made[name, patients])

    return make


@pytest.fixture
def backbone():
    return load_backbone("random:vitnano8", seed=0)


@pytest.fixture
def quick():
    def settings(**changes):
        base = {
            "protocols": ("knn", "linear"),
            "features": FeaturesConfig(image_size_px=32, device="cpu"),
            "split": SplitConfig(repeats=2),
            "logistic": LogisticConfig(values=5),
            "linear": LinearConfig(min_steps=15, learning_rates=(1e-2, 5e-2)),
            "mlp": MlpConfig(min_steps=15, hidden_dims=(16,)),
            "finetune": FinetuneConfig(epochs=2, partial_stages=1, lora_rank=2),
            "few_shot": FewShotConfig(patients_per_class=(1, 2), draws=2),
            "statistics": StatisticsConfig(resamples=50),
        }
        return ClassificationConfig(**{**base, **changes})

    return settings
