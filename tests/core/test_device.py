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
