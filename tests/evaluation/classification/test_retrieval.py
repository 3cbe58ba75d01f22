import csv

import pytest
import torch
from meddino_evaluation.classification import retrieval
from meddino_evaluation.classification.config import SplitConfig
from meddino_evaluation.classification.retrieval import retrieve
from meddino_evaluation.data.splits import draw_splits, save_split


def test_retrieve__follows_a_given_split(fake_set, backbone, quick, tmp_path):
    dataset = fake_set("ct_contrast")
    split = draw_splits(dataset.cases, "the set", repeats=4, val_fraction=0.2, test_fraction=0.3, seed=7)[3]
    save_split(tmp_path / "split.json", "the set", split)
    config = quick(split=SplitConfig(repeats=1, file=tmp_path / "split.json"))
    retrieve(backbone, dataset, config, tmp_path / "out")
    with (tmp_path / "out" / "per_case.csv").open() as stream:
        assert {row["case"] for row in csv.DictReader(stream)} == set(split.test)


def test_retrieve__a_backbone_that_moved_is_a_fault(fake_set, backbone, quick, tmp_path, monkeypatch):
    per_case = retrieval.retrieval_per_case

    def drifts(*features):
        with torch.no_grad():
            next(backbone.parameters()).add_(1)
        return per_case(*features)

    monkeypatch.setattr(retrieval, "retrieval_per_case", drifts)
    with pytest.raises(RuntimeError, match="changed while features were computed"):
        retrieve(backbone, fake_set("ct_contrast"), quick(), tmp_path)
