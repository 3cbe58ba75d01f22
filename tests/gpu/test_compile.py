"""What is compiled, how often, and that nothing falls back: counted by Dynamo, which is all that the "eager" backend runs."""

import json

import pytest
import torch
from meddino_pretrain.bench.step import MeasuredStep, StepSize
from meddino_pretrain.methods.base import backbones_in

from meddino.core.compilation import wants_compiling
from meddino.core.device import find_machine
from meddino.core.machine_config import MachineConfig
from meddino.layers.projection_head import ProjectionHead
from tests.gpu.tiny import tiny_method

COUNTED = """
    import json
    import torch._dynamo.utils as counted
    from meddino.core import compilation
    from meddino.core.device import find_machine
    from meddino.models import vision_transformer
    from meddino_pretrain.bench.step import random_batches
    from tests.gpu.tiny import tiny_size, tiny_step

    compilation.BACKEND = "eager"
    vision_transformer.ALL_GROUPS_AT_ONCE = ()  # as on a GPU
    step = tiny_step({precision!r}, compile=True, activation_checkpointing={checkpointing!r})
    graphs = []
    for sizes in ({{}}, {{}}, {{"global_px": 48, "local_px": 24}}, {{"global_px": 40, "local_px": 32}}):
        step.batches = random_batches(tiny_size(**sizes), find_machine("cpu"))
        step.run()
        graphs.append(counted.counters["stats"]["unique_graphs"])
    print(json.dumps({{"graphs": graphs, "breaks": dict(counted.counters["graph_break"])}}))
"""


@pytest.mark.parametrize(
    ("precision", "checkpointing"),
    [("bf16", False), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("fp32", "selective"), ("bf16", True)))],
)
def test_compile__no_break_and_no_recompilation_between_crop_sizes(run_ranks, precision, checkpointing):
    (said,) = run_ranks(COUNTED.format(precision=precision, checkpointing=checkpointing), 1)
    found = json.loads(said)
    assert found["breaks"] == {}
    # Blocks: the student's, and the frozen networks' together; heads: with a gradient and without; functions of losses.
    assert found["graphs"] == [found["graphs"][0]] * 4 and 4 <= found["graphs"][0] <= 12


def test_compile__covers_every_block_of_every_network_and_the_heads():
    method = MeasuredStep(StepSize("vitnano8", 2, tiny_method()), find_machine("cpu"), MachineConfig(compile=True)).method
    assert set(method.networks()) == {"student", "teacher", "gram_teacher", "initial_teacher"}
    blocks = [block for backbone in backbones_in(method.networks()).values() for block in backbone.blocks]
    heads = [each for net in method.networks().values() for each in net.modules() if isinstance(each, ProjectionHead)]
    assert len(blocks) == 4 * 4 and len(heads) == 4
    assert all("forward" in vars(part) for part in (*blocks, *heads))
    plain = MeasuredStep(StepSize("vitnano8", 2, tiny_method()), find_machine("cpu"), MachineConfig()).method
    assert not any("forward" in vars(part) for part in plain.parts())


def test_wants_compiling__auto_is_a_cuda_device():
    assert wants_compiling("auto", torch.device("cuda")) and not wants_compiling("auto", torch.device("cpu"))
    assert wants_compiling(True, torch.device("cpu")) and not wants_compiling(False, torch.device("cuda"))
