import copy
from unittest.mock import create_autospec

import pytest
import torch
from meddino_evaluation.adaptation.config import FinetuneConfig
from meddino_evaluation.adaptation.features import Transform
from meddino_evaluation.adaptation.finetune import ImageBank, finetune
from meddino_evaluation.adaptation.fitting import load_state
from meddino_evaluation.adaptation.trainable import adapt, held_tensors, lora_targets, set_training_mode
from meddino_evaluation.backbones.adapter import state_hash
from meddino_evaluation.backbones.load import load_backbone
from safetensors.torch import save_file
from torch import nn

from meddino.core.device import find_machine
from meddino.core.errors import ConfigError

CONFIG = FinetuneConfig(epochs=3, batch_size=8, partial_stages=1, lora_rank=3, backbone_lr=1e-3, head_lr=1e-2, adapter_lr=1e-2)
MODES = ["finetune", "partial", "lora", "bitfit"]


def _tuned(backbone, dataset, mode, config=CONFIG, seed=0):
    bank = ImageBank(backbone, Transform(32, dataset.config.modality, None, None, 1))
    val = dataset.cases[::3]
    train = tuple(case for case in dataset.cases if case not in val)
    options = {"kind": "binary", "outputs": 2, "metric": "log_loss", "machine": find_machine("cpu")}
    return finetune(backbone, train, val, mode=mode, config=config, bank=bank, seed=seed, **options)


@pytest.mark.parametrize("mode", MODES)
def test_finetune__what_learns_has_moved_and_what_is_held_has_not(fake_set, backbone, mode):
    pytest.importorskip("peft")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    untouched = state_hash(backbone)
    tuned = _tuned(backbone, fake_set("ct_contrast"), mode)
    assert state_hash(backbone) == untouched  # the original stays: the next draw starts from it
    own = tuned.model.backbone
    moved, held = [], []
    for name, tensor in own.named_parameters():
        original = before.get(name.replace(".base_layer", ""))
        if original is not None:
            (moved if not torch.equal(tensor, original) else held).append(name)
    lora = [tensor for name, tensor in own.named_parameters() if "lora_B" in name]
    if mode == "lora":
        assert not moved
        assert lora
        assert all(tensor.abs().sum() > 0 for tensor in lora)  # B starts at zero: it has learned
    elif mode == "bitfit":
        assert moved
        assert all(name.endswith("bias") for name in moved)
    elif mode == "partial":
        assert any(name.startswith("network.blocks.3") for name in moved)
        assert all(name.startswith(("network.blocks.3", "network.norm")) for name in moved)
    else:
        assert len(moved) > len(held)
    assert min(look["loss"] for look in tuned.history[1:]) < tuned.history[0]["loss"]


def test_adapt__lora_and_bitfit_counts_by_formula(backbone):
    pytest.importorskip("peft")
    rank, width, blocks = 48, 128, 4
    lora = copy.deepcopy(backbone)
    adapt(lora, "lora", FinetuneConfig(), 0)
    expected = blocks * rank * ((width + 3 * width) + 2 * (width + 4 * width))  # qkv, fc1, fc2: r (in + out)
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == expected
    assert len(lora_targets(backbone)) == 3 * blocks
    bitfit = copy.deepcopy(backbone)
    adapt(bitfit, "bitfit", CONFIG, 0)
    biases = blocks * (3 * width + width + 4 * width + width + 2 * width) + 2 * width  # qkv proj fc1 fc2 norms; norm, patches
    assert sum(p.numel() for p in bitfit.parameters() if p.requires_grad) == biases


def test_adapt__lora_starts_at_the_pretrained_function_and_has_gradients(backbone):
    pytest.importorskip("peft")
    lora = copy.deepcopy(backbone)
    adapt(lora, "lora", CONFIG, 0)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(lora.eval()(images), backbone(images))
    lora(images).square().sum().backward()
    gradients = {name: p.grad for name, p in lora.named_parameters() if p.grad is not None}
    assert gradients
    assert all("lora_" in name for name in gradients)
    assert all(g.abs().sum() > 0 for name, g in gradients.items() if "lora_B" in name)


def _resnet():
    return load_backbone("random:timm:resnet10t")


@pytest.mark.parametrize("mode", ["finetune", "partial", "bitfit"])
def test_finetune__held_batch_norms_do_not_drift(fake_set, mode):
    backbone = _resnet()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    tuned = _tuned(backbone, fake_set("ct_contrast"), mode)
    drifted = {name for name, buffer in tuned.model.backbone.named_buffers() if not torch.equal(buffer, before[name])}
    if mode == "bitfit":
        assert not drifted
    elif mode == "partial":
        assert drifted
        assert all(name.startswith("network.model.layer4") for name in drifted)
    else:
        assert any(name.startswith("network.model.layer1") for name in drifted)


def test_set_training_mode__only_what_may_change(backbone):
    resnet = _resnet()
    adapt(resnet, "bitfit", CONFIG, 0)
    set_training_mode(resnet)
    assert not any(module.training for module in resnet.modules() if isinstance(module, nn.BatchNorm2d))
    assert all(tensor.requires_grad is False for _, tensor in held_tensors(resnet) if isinstance(tensor, nn.Parameter))


def test_adapt__a_convolutional_network_has_no_lora():
    with pytest.raises(ConfigError, match="no linear layers qkv"):
        adapt(_resnet(), "lora", CONFIG, 0)
    with pytest.raises(ConfigError, match="stages; finetune"):
        adapt(load_backbone("random:vitnano8"), "partial", FinetuneConfig(partial_stages=9), 0)


def test_finetune__same_seed_same_result_other_seed_another(fake_set, backbone):
    dataset = fake_set("ct_contrast")
    one, again, other = (_tuned(backbone, dataset, "bitfit", seed=seed) for seed in (0, 0, 1))
    assert state_hash(one.model) == state_hash(again.model)
    assert state_hash(one.model) != state_hash(other.model)


def test_finetune__validation_chooses_the_epoch(fake_set, backbone):
    tuned = _tuned(backbone, fake_set("ct_contrast"), "finetune")
    best = max(tuned.history, key=lambda look: look["val_score"])
    assert tuned.chosen["epoch"] == best["epoch"]
    assert len(tuned.history) == 3


def test_finetune__volumes_are_averaged_over_their_real_slices(fake_set, backbone):
    dataset = fake_set("glioma_grading")
    bank = ImageBank(backbone, Transform(32, "image", None, None, 1))
    tuned = _tuned(backbone, dataset, "bitfit")
    together = tuned.probabilities(dataset.cases[:4], bank, "binary", 4)
    alone = [tuned.probabilities([case], bank, "binary")[0] for case in dataset.cases[:4]]
    torch.testing.assert_close(
        torch.from_numpy(together), torch.stack([torch.from_numpy(one) for one in alone]), atol=1e-5, rtol=0
    )


def test_load_state__an_encoder_that_an_earlier_version_trained(tmp_path):
    wanted = {
        "backbone.network.blocks.0.bias": torch.ones(2),
        "backbone.network.model.fc.bias": torch.ones(2),
        "head.bias": torch.ones(1),
    }
    earlier = ("backbone.vit.blocks.0.bias", "backbone.model.fc.bias", "head.bias")
    taken = {}
    for names in (earlier, wanted):
        save_file(dict(zip(names, wanted.values(), strict=True)), tmp_path / "w.safetensors")
        module = create_autospec(torch.nn.Module, instance=True)
        module.load_state_dict.side_effect = lambda tensors, strict: taken.update(tensors)
        load_state(module, tmp_path / "w.safetensors", wanted)
        assert taken.keys() == wanted.keys()


def test_finetune__a_head_of_two_layers_learns_too(fake_set, backbone):
    dataset = fake_set("ct_contrast")
    bank = ImageBank(backbone, Transform(32, dataset.config.modality, None, None, 1))
    options = {"kind": "binary", "outputs": 2, "metric": "log_loss", "machine": find_machine("cpu")}
    tuned = finetune(
        backbone, dataset.cases, dataset.cases, mode="finetune", config=CONFIG, bank=bank, seed=0, hidden_dim=6, **options
    )
    shapes = [tuple(one.weight.shape) for one in tuned.model.head if hasattr(one, "weight")]
    assert shapes == [(6, backbone.embed_dim), (2, 6)]
    # Biases start at zero: both layers have learned.
    assert all(one.bias.abs().sum() > 0 for one in tuned.model.head if hasattr(one, "bias"))
