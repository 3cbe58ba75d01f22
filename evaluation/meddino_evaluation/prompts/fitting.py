"""Training of one mask decoder on the maps of a held image encoder."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

import meddino
from meddino.core.files import canonical_json, sha256_file
from meddino.core.logging import get_logger
from meddino.core.seeds import numpy_rng
from meddino_evaluation.adaptation.fitting import Clock, FitLoop, FreezeCheck, StepRecord, linear_decay, save_state
from meddino_evaluation.backbones.adapter import state_hash
from meddino_evaluation.data.prepare import GridRule
from meddino_evaluation.data.splits import Split
from meddino_evaluation.prompts.config import PromptConfig
from meddino_evaluation.prompts.masks import drawn_prompt, encoded, squared, targets_of, training_mask
from meddino_evaluation.prompts.network import PromptNetwork
from meddino_evaluation.segmentation.experiment import Experiment
from meddino_evaluation.segmentation.training.fitting import log_step, open_log, tell_absent, weights_path
from meddino_evaluation.segmentation.training.losses import SMOOTH
from meddino_evaluation.segmentation.training.map_cache import MapCache

logger = get_logger(__name__)


def fit_decoder(
    experiment: Experiment,
    config: PromptConfig,
    network: PromptNetwork,
    cache: MapCache,
    split: Split,
    seed: int,
    out: Path,
    identity: str,
    clock: Clock,
) -> None:
    """Train the decoder of a fold and seed and write its weights; prompts are drawn anew at every step."""
    training, labels, device = config.training, experiment.dataset.labels, experiment.machine.device
    rule = GridRule(size_px=config.size_px)
    cases = [experiment.prepare(name, rule) for name in experiment.training_cases(split, seed)]
    targets = targets_of(cases, labels)
    name = f"fold {split.number}, seed {seed}"
    logger.info("%s: %d masks in %d cases", name, len(targets), len(cases))
    tell_absent(experiment, {value for case in cases for values in case.present for value in values}, name)

    def loss_of(step: int) -> Tensor:
        rng = numpy_rng(seed, "prompt batch", step)
        drawn = [targets[int(place)] for place in rng.integers(len(targets), size=training.batch_size)]
        masks = [training_mask(cases[one.case], one, labels) for one in drawn]
        settings = config.prompts.model_copy(update={"seed": seed})
        prompts = [
            drawn_prompt(mask, settings, config.size_px, "training", step, place) for place, (mask, _) in enumerate(masks)
        ]
        maps = torch.cat([encoded(network, cache, cases[one.case], one.z, config.data.neighbour_slices) for one in drawn])
        wanted, counted = (
            torch.stack([squared(torch.from_numpy(np.ascontiguousarray(pair[side])), config.size_px, False) for pair in masks])
            for side in (0, 1)
        )
        with experiment.machine.autocast():
            logits = network(maps, prompts)
        return mask_loss(logits, wanted.to(device), counted.to(device), training.dice_weight, training.ce_weight)

    learning = [parameter for part in network.parts.values() for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=training.lr, weight_decay=training.weight_decay)
    freeze = FreezeCheck(network.backbone, network.parts if training.steps else {})
    before = state_hash(network.prompt_encoder)
    schedule = linear_decay(optimizer, max(training.steps, 1))
    loop = FitLoop(network, optimizer, schedule, loss_of, training.steps, clip_norm=training.clip_norm)
    network.train()
    with open_log(out, split.number, seed) as stream:

        def on_step(record: StepRecord) -> bool:
            clock.tick()
            if record.step % training.log_every_steps == 0 or record.step + 1 == training.steps:
                log_step(stream, record, name, training.steps, clock)
            return True

        loop.fit(on_step)
    freeze.check("prompts")
    if state_hash(network.prompt_encoder) != before:
        raise RuntimeError("the prompt encoder is held, and a tensor of it moved")
    save_state(weights_path(out, split.number, seed), network.own_state(), {"identity": identity})


def mask_loss(
    logits: Float[Tensor, "masks rows cols"],
    wanted: Bool[Tensor, "masks rows cols"],
    counted: Bool[Tensor, "masks rows cols"],
    dice_weight: float,
    ce_weight: float,
) -> Float[Tensor, ""]:
    """Soft Dice of every mask by itself + binary cross-entropy, each the mean over masks.

    Args:
        logits: One map a prompt.
        wanted: Its mask.
        counted: Pixels that count; those of padding and ignored ones do not.
        dice_weight: Weight of the Dice loss.
        ce_weight: Weight of the cross-entropy.
    """
    target, weight = wanted.float(), counted.float()
    unit = logits.float().sigmoid()
    overlap = (unit * target * weight).sum((1, 2))
    total = ((unit + target) * weight).sum((1, 2))
    dice = 1 - (2 * overlap + SMOOTH) / (total + SMOOTH).clamp_min(1e-8)
    pixels = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none") * weight
    entropy = pixels.sum((1, 2)) / weight.sum((1, 2)).clamp_min(1)
    return (dice_weight * dice + ce_weight * entropy).mean()


def run_identity(experiment: Experiment, config: PromptConfig, split: Split) -> str:
    """Return a hash of everything a fold's decoders depend on; what was trained under another one is never taken up."""
    excluded: Any = {
        "seeds": True,
        "splits": True,
        "metrics": True,
        "data": {"cache"},
        "training": {"map_cache_mib", "log_every_steps"},
    }
    parts = {
        "config": config.model_dump(mode="json", exclude=excluded),
        "decoder": None if config.decoder.weights is None else sha256_file(Path(config.decoder.weights)),
        "run": experiment.identity(split),
        "version": meddino.__version__,
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()
