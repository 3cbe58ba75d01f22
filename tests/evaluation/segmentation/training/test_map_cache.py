import pytest
import torch
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.segmentation.networks.heads import LinearHead
from meddino_evaluation.segmentation.networks.network import SegmentationNetwork
from meddino_evaluation.segmentation.run import segment
from meddino_evaluation.segmentation.training.map_cache import CropKey, MapCache

from meddino.core.device import find_machine

KEYS = [CropKey("a", 0, 0, 0), CropKey("a", 0, 0, 16), CropKey("b", 3, 0, 0)]


@pytest.fixture
def network():
    backbone = load_backbone("random:vitnano8")
    return SegmentationNetwork(backbone, 2, LinearHead([(128, 8)] * 2, 2), backbone.contract, "frozen")


def test_maps__from_memory_disk_and_computed_are_the_same(network, tmp_path, caplog):
    images, machine = torch.randn(3, 3, 32, 32), find_machine("cpu")

    def folder(case):
        return tmp_path / case

    first = MapCache(network, machine, 100, folder)
    wanted = first.maps(images, KEYS)
    assert [tuple(one.shape) for one in wanted] == [(3, 128, 4, 4)] * 2
    assert first.computed == 3
    again, nowhere, small = (
        MapCache(network, machine, 100, folder),
        MapCache(network, machine, 100),
        MapCache(network, machine, 0),
    )
    for cache, computed in ((first, 3), (again, 0), (nowhere, 3), (small, 3)):
        for found, one in zip(cache.maps(images, KEYS), wanted, strict=True):
            assert torch.equal(found, one)
        assert cache.computed == computed
    nowhere.maps(images, KEYS)
    small.maps(images, KEYS)
    assert (nowhere.computed, small.computed) == (3, 6)  # memory of 0 MiB keeps nothing
    (tmp_path / "a/0_0_16.safetensors").write_bytes(b"damaged")
    repaired = MapCache(network, machine, 100, folder)
    assert torch.equal(repaired.maps(images, KEYS)[1], wanted[1])
    assert repaired.computed == 1
    assert "is damaged and is computed anew" in caplog.text


def test_cache_folder__another_run_encodes_nothing_and_learns_the_same(make_dataset, tiny_config, tmp_path, monkeypatch):
    data = make_dataset()
    plain = segment(tiny_config(), "random:vitnano8", data, tmp_path / "plain")
    cached = tiny_config(data={"cache": str(tmp_path / "cache")})
    segment(cached, "random:vitnano8", data, tmp_path / "first")
    monkeypatch.setattr(MapCache, "_write", lambda *_: pytest.fail("a crop was encoded again"))
    assert segment(cached, "random:vitnano8", data, tmp_path / "second")["test"] == plain["test"]
