import os

import pytest
import torch

from meddino.core.device import find_machine
from meddino.core.errors import ConfigError


def test_find_machine__cpu_computes_in_fp32():
    machine = find_machine("cpu")
    assert machine.device.type == "cpu"
    assert machine.compute_dtype == torch.float32
    assert not machine.is_accelerator
    with machine.autocast():
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.float32


def test_find_machine__bf16_by_request():
    with find_machine("cpu", "bf16").autocast():
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_find_machine__absent_device_is_named():
    with pytest.raises(ConfigError, match="device 'cuda' is not available"):
        find_machine("cuda")
    with pytest.raises(ConfigError, match="device 'teapot' is unknown"):
        find_machine("teapot")


def test_find_machine__float64_throughout_by_request():
    machine = find_machine("cpu", "fp64")
    assert machine.compute_dtype == machine.weight_dtype == torch.float64
    with machine.autocast():
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.float32  # nothing is cast on the way
    assert find_machine("cpu", "bf16").weight_dtype == torch.float32


@pytest.mark.parametrize(("has_bf16", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_find_machine__a_gpu_that_only_emulates_bf16_computes_in_fp32(monkeypatch, has_bf16, wanted):
    asked = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", asked.append)
    # As on a V100, a T4 or an RTX 20: yes, if slow ones count.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    machine = find_machine("auto", "auto", local_rank=5)
    assert machine.device == torch.device("cuda", 1) and machine.compute_dtype == wanted
    assert asked == [1, "high" if has_bf16 else "highest"]  # TF32 only where products are asked for in bf16
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
