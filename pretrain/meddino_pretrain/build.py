"""Makes finished objects out of a recipe. Nothing else walks into a config."""

import copy
import itertools
from collections.abc import Iterable, Iterator

import torch

from meddino.core.device import Machine
from meddino.core.errors import ConfigError
from meddino.core.logging import get_logger
from meddino.core.seeds import derive_seed
from meddino.data.corpus import Corpus
from meddino.distributed.collectives import rank, world_size
from meddino.distributed.parallel import choose_parallel, replicate, shard
from meddino.layers.projection_head import ProjectionHead
from meddino.models.registry import backbone_config, build_backbone
from meddino.models.vision_transformer import VisionTransformer
from meddino_pretrain.config import OptimizerConfig, PretrainConfig, StageConfig
from meddino_pretrain.data.batches import Batch, RawBatch, to_model_input
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.data.loader import Loader, build_loader
from meddino_pretrain.data.sampler import BatchShare
from meddino_pretrain.methods.dinov3.config import HeadConfig
from meddino_pretrain.methods.dinov3.method import DINOv3Objective
from meddino_pretrain.methods.dinov3.network import DINOv3Network
from meddino_pretrain.monitoring.metrics import MetricsWriter
from meddino_pretrain.monitoring.monitor import Watch
from meddino_pretrain.monitoring.progress import StepProgress
from meddino_pretrain.monitoring.speed import SpeedMeter, parameter_counts
from meddino_pretrain.optimizer import build_optimizer, parameter_rules
from meddino_pretrain.run.checkpoints import StageCheckpoints
from meddino_pretrain.run.signals import StopRequest
from meddino_pretrain.schedules import Schedules
from meddino_pretrain.trainer import Trainer

logger = get_logger(__name__)


def build_networks(config: PretrainConfig) -> tuple[DINOv3Network, DINOv3Network]:
    """Return student and teacher with the same fresh weights, a function of the recipe's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "init"))
        backbone = build_backbone(config.backbone.name, **config.backbone.changes)
        if not isinstance(backbone, VisionTransformer):
            raise ConfigError(
                f"backbone.name is '{config.backbone.name}'; dinov3 masks patches, which needs a vision transformer"
            )
        student = DINOv3Network(
            backbone, _build_head(backbone.embed_dim, config.heads.dino), _build_head(backbone.embed_dim, config.heads.ibot)
        )
    return student, copy.deepcopy(student)


def build_objective(
    config: PretrainConfig,
    stage: StageConfig,
    seed: int,
    machine: Machine,
    student: DINOv3Network,
    teacher: DINOv3Network,
) -> DINOv3Objective:
    """Place the networks on the device, spread them over the processes and join them to the stage's objective.

    Args:
        config: The recipe.
        stage: The stage's part of it.
        seed: The stage's seed.
        machine: Where it runs.
        student: From `build_networks`, not yet spread.
        teacher: Likewise.

    Raises:
        ConfigError: These ways of running do not work together.
    """
    student.to(machine.device, machine.weight_dtype)
    teacher.to(machine.device, machine.weight_dtype).requires_grad_(False)
    gram_teacher = copy.deepcopy(teacher.backbone) if stage.gram_teacher is not None else None
    leash_teacher = copy.deepcopy(teacher.backbone) if stage.losses.leash_weight > 0 else None
    if config.machine.activation_checkpointing:
        student.backbone.recompute_activations()
    if config.machine.compile:
        for block in [*student.backbone.parts(), *teacher.backbone.parts()]:
            # For any number of tokens at once: drop path changes it from step to step. A kernel for one number would be
            # followed by one for any, and activation checkpointing then recomputes with another than it began with.
            block.compile(dynamic=True)
    parallel = choose_parallel(config.machine.parallel)
    if parallel == "fsdp2" and config.machine.compile and config.machine.activation_checkpointing:
        # A compiled block keeps its tensors in another order when it is recomputed between FSDP2's hooks (torch 2.14).
        raise ConfigError(
            "machine.compile, machine.activation_checkpointing and machine.parallel=fsdp2 do not work together: give up one "
            "of the three (any two of them do)"
        )
    called: torch.nn.Module = student
    if parallel == "fsdp2":
        shard(student, student.backbone.parts(), ["global_cls"], trained=True)
        shard(teacher, teacher.backbone.parts(), ["target_bottlenecks", "look"])
        for frozen in (gram_teacher, leash_teacher):
            if frozen is not None:
                shard(frozen, frozen.parts())
    elif parallel == "ddp":
        called = replicate(student, machine.device)
    share = BatchShare(stage.global_batch, rank(), world_size(), stage.accumulation)
    return DINOv3Objective(student, teacher, gram_teacher, stage.losses, machine, share, seed, called, leash_teacher)


def build_stage_optimizer(config: OptimizerConfig, objective: DINOv3Objective) -> torch.optim.AdamW:
    """Return AdamW over the objective's trained modules, with a fresh state."""
    rules = parameter_rules(objective.trained, config.layerwise_decay, config.patch_embed_lr_multiplier)
    return build_optimizer(objective.trained, rules, config.betas, fused=True)


def build_stage_loader(
    config: PretrainConfig, stage: StageConfig, seed: int, corpus: Corpus, machine: Machine, first_step: int
) -> Loader:
    """Return this process's loader from a step to the stage's end."""
    if len(corpus) < stage.global_batch and rank() == 0:
        logger.warning(
            "corpus %s holds %d slices, a batch %d: each shows slices more than once",
            corpus.root,
            len(corpus),
            stage.global_batch,
        )
    return build_loader(
        corpus,
        stage.crops,
        stage.masking,
        Intensities(config.contracts, stage.augment),
        config.loader,
        patch_size=backbone_config(config.backbone.name, **config.backbone.changes).patch_size,
        seed=seed,
        global_batch=stage.global_batch,
        first_step=first_step,
        last_step=stage.steps,
        rank=rank(),
        world_size=world_size(),
        accumulation=stage.accumulation,
        pin_memory=machine.is_accelerator,
    )


def steps_of(
    loader: Iterable[RawBatch], accumulation: int, machine: Machine, intensities: Intensities
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of one optimizer step after the other, on the device."""
    waiting = iter(loader)
    while raw := list(itertools.islice(waiting, accumulation)):
        yield [to_model_input(batch, machine, intensities) for batch in raw]


def build_trainer(
    config: PretrainConfig,
    stage: StageConfig,
    objective: DINOv3Objective,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    checkpoints: StageCheckpoints,
    metrics: MetricsWriter | None,
    progress: StepProgress,
    watch: Watch,
    peak: float,
    stop: StopRequest,
    machine: Machine,
) -> Trainer:
    """Join a stage's parts.

    Args:
        config: The recipe.
        stage: The stage's part of it.
        objective: Networks and losses.
        optimizer: Over the trained modules.
        loader: From the step stood at.
        checkpoints: Knows the step stood at; saves.
        metrics: Where records go.
        progress: What people see.
        watch: Looks at the teacher.
        peak: Operations a second that the machine reaches.
        stop: Whether a signal came.
        machine: Where it runs.
    """
    with torch.device("meta"):
        shapes, _ = build_networks(config)
    parts = (f"{name} {count:,}" for name, count in parameter_counts(shapes).items())
    logger.info("parameters of the student: %s", ", ".join(parts))
    return Trainer(
        objective=objective,
        optimizer=optimizer,
        schedules=Schedules(stage.schedule, stage.steps),
        steps=steps_of(loader, stage.accumulation, machine, loader.maker.intensities),
        checkpoints=checkpoints,
        metrics=metrics,
        progress=progress,
        watch=watch,
        speed=SpeedMeter(shapes, stage.gram_teacher is not None, peak),
        stop=stop,
        machine=machine,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        max_bad_steps=config.optimizer.max_bad_steps,
    )


def _build_head(in_dim: int, config: HeadConfig) -> ProjectionHead:
    return ProjectionHead(in_dim, config.prototypes, config.hidden_dim, config.bottleneck_dim, config.layers)
