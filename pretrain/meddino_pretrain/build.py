"""Makes finished objects out of a recipe. Nothing else walks into a config."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from meddino.core.compilation import compile_functions, compile_modules, wants_compiling
from meddino.core.device import Machine
from meddino.core.errors import ConfigError
from meddino.core.logging import get_logger
from meddino.core.machine_config import MachineConfig
from meddino.core.seeds import derive_seed
from meddino.data.corpus import Corpus
from meddino.distributed.collectives import rank, world_size
from meddino.distributed.parallel import choose_parallel, replicate, shard
from meddino.layers.attention import use_packed_kernel
from meddino.models.registry import backbone_config, build_backbone
from meddino_pretrain.config import OptimizerConfig, PretrainConfig, StageConfig
from meddino_pretrain.data.batches import Batch, to_model_input
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.data.loader import Loader, SampleMaker
from meddino_pretrain.data.sampler import BatchShare, sample_order
from meddino_pretrain.data.views import ViewSpec
from meddino_pretrain.methods import method_class
from meddino_pretrain.methods.base import Method, StageSetting, backbones_in, shapes_of
from meddino_pretrain.monitoring.speed import SpeedMeter, parameter_counts
from meddino_pretrain.optimizer import build_optimizer, parameter_rules

logger = get_logger(__name__)


def check_views(config: PretrainConfig) -> dict[str, ViewSpec]:
    """Return every stage's views, whose sizes and channels the backbone can take.

    Raises:
        ConfigError: It cannot; the message names each size, or the channels.
    """
    name, channels, changes = config.backbone.name, config.input_contract.channels, config.backbone.changes
    if (taken := backbone_config(name, **changes).in_chans) != channels:
        raise ConfigError(
            f"input_contract gives {channels} channels, backbone {name} takes {taken}: let the contract have {taken} (grey is "
            f"repeated), or set backbone.changes.in_chans={channels}"
        )
    with torch.device("meta"):
        multiple_px = build_backbone(config.backbone.name, **config.backbone.changes).multiple_px
    specs = {name: method_class(stage.method).views(stage.method) for name, stage in config.stages.items()}
    for name, spec in specs.items():
        spec.check_sides(multiple_px, f"stages.{name}")
    return specs


def largest_px(specs: Mapping[str, ViewSpec]) -> int:
    """Return the side of the largest crop of all stages."""
    return max(max(spec.main_px) for spec in specs.values())


def build_method(config: PretrainConfig, stage: StageConfig, seed: int, machine: Machine) -> Method:
    """Return a stage's method with fresh weights, a function of the recipe's seed alone, on the current default device.

    Args:
        config: The recipe.
        stage: The stage's part of it.
        seed: The stage's seed.
        machine: Where it will run.
    """
    share = BatchShare(stage.global_batch, rank(), world_size(), stage.accumulation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "init"))
        backbone = build_backbone(config.backbone.name, **config.backbone.changes)
        return method_class(stage.method).build(stage.method, backbone, StageSetting(stage.steps, seed, share, machine))


def spread_method(method: Method, config: MachineConfig, machine: Machine) -> None:
    """Place a method's networks on the device and spread them over the processes, in place."""
    networks = method.networks()
    for network in networks.values():
        network.to(machine.device, machine.weight_dtype)
    if config.activation_checkpointing:
        for backbone in backbones_in({"": method.model}).values():
            backbone.recompute_activations(selective=config.activation_checkpointing == "selective")
    use_packed_kernel(method.model, config.packed_attention, machine.device)
    compiles = wants_compiling(config.compile, machine.device)
    compile_functions(compiles)
    if compiles:
        compile_modules(method.parts())
    parallel = choose_parallel(config.parallel)
    if parallel == "fsdp2":
        for name, network in networks.items():
            parts = [part for backbone in backbones_in({name: network}).values() for part in backbone.parts()]
            methods = getattr(network, "forward_methods", ())
            shard(network, parts, methods, trained=network is method.model, dtype=machine.compute_dtype)
    elif parallel == "ddp":
        method.called = replicate(method.model, machine.device)


def build_stage_optimizer(config: OptimizerConfig, method: Method) -> torch.optim.AdamW:
    """Return AdamW over the method's trained modules, with a fresh state."""
    modules = method.trainable()
    schedules = ("backbone", *method.lr_schedules)
    rules = parameter_rules(modules, config.layerwise_decay, config.patch_embed_lr_multiplier, schedules)
    return build_optimizer(modules, rules, config.betas, fused=True)


def build_loader(
    config: PretrainConfig,
    stage: StageConfig,
    seed: int,
    corpus: Corpus,
    patch_px: int,
    pin_memory: bool,
    first_step: int,
    stopped: Callable[[], bool],
) -> Loader:
    """Return this process's loader from a step to the stage's end; see `Loader` for the rest."""
    if len(corpus) < stage.global_batch and rank() == 0:
        logger.warning(
            "corpus %s holds %d slices, a batch %d: each shows slices more than once",
            corpus.root,
            len(corpus),
            stage.global_batch,
        )
    method = method_class(stage.method)
    maker = SampleMaker(
        corpus=corpus,
        spec=method.views(stage.method),
        collate=partial(method.collate, stage.method, patch_px),
        intensities=Intensities(config.contracts, stage.augment),
        order=sample_order(corpus, config.corpus.sampling, seed, stage.global_batch),
        share=BatchShare(stage.global_batch, rank(), world_size(), stage.accumulation),
        repeat_crop=config.corpus.sampling.repeat_crop,
    )
    return Loader(maker, config.loader, first_step, stage.steps, pin_memory, stopped)


def steps_of(loader: Loader, machine: Machine) -> Iterator[list[Batch]]:
    """Yield the micro-batches of one optimizer step after the other; of several, one at a time is on the device."""
    waiting, maker = iter(loader), loader.maker
    while raw := list(itertools.islice(waiting, maker.share.accumulation)):
        yield [to_model_input(batch, maker.spec, machine, maker.intensities, keep=len(raw) == 1) for batch in raw]


def build_speed_meter(config: PretrainConfig, stage: StageConfig, machine: Machine, peak: float) -> SpeedMeter:
    """Return what counts a stage's operations, and say how many parameters are trained.

    Args:
        config: The recipe.
        stage: The stage's part of it.
        machine: Where it runs.
        peak: Operations a second that the machine reaches.
    """
    shapes = shapes_of(lambda: build_method(config, stage, 0, machine))
    parts = (f"{name} {count:,}" for name, count in parameter_counts(shapes.model).items())
    logger.info("parameters that are trained: %s", ", ".join(parts))
    return SpeedMeter(shapes.flops, peak)
