"""`meddino-pretrain RECIPE --plan`: what a run would take, by arithmetic, before anything is computed or queued.

The arithmetic is that of docs/scaling.md: bytes and operations a token, from which a stage's memory and hours follow.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from meddino.core.command import usable_cores
from meddino.core.device import Machine
from meddino.core.errors import ConfigError, MedDINOError
from meddino.core.files import check_free_space, sizes_below
from meddino.data.joined_corpus import open_corpora
from meddino_pretrain.build import build_method, check_views, largest_px
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.data.sampler import BatchShare, slices_left_out
from meddino_pretrain.data.views import View
from meddino_pretrain.methods.base import shapes_of
from meddino_pretrain.run.corpus_audit import check_corpus, weight_warnings
from meddino_pretrain.run.initialization import read_init

# Bytes that the forward pass keeps for the backward pass, a token and a unit of width, in bf16: of each block, of each block
# and of the one at work where blocks are recomputed; and what a pass without a backward pass takes while a block is at work.
KEPT, KEPT_CHECKPOINTED, TEACHER = 40.5, 2.4, 26.0
# Share of a card's peak in bf16 at which the paper's authors must have run (docs/scaling.md).
REACHED = 0.4
# Share of a core's fastest float32 product that training reaches (`meddino-pretrain bench step`: share_of_own_peak).
REACHED_CPU = 0.7
# An estimate this much above the memory there is is beyond doubt: drop path and lazy allocation save up to a fifth.
BEYOND_DOUBT = 1.25
# torch itself and a GPU's context, rounded up.
PROCESS_BYTES = 1e9
# Share of the patches of the teacher's views that go through a head (DINOv3: half of the views, 10 to 50 %).
MASKED = 0.15
GIB = 2.0**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: memory [GiB] and peak of dense bf16 products [operations a second], from the makers' data sheets.

    Attributes:
        reached: Share of that peak; by the traced bytes of a step it falls where memory is slow beside the peak.
    """

    memory_gib: float
    flops: float
    reached: float = REACHED


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(80, 312e12),
    "a100_40": Gpu(40, 312e12),
    "a6000": Gpu(48, 155e12),
    "h100": Gpu(80, 989e12, 0.33),
    "h200": Gpu(141, 989e12, 0.33),
    "l40s": Gpu(48, 362e12),
    "rtx3090": Gpu(24, 71e12),
    "rtx4090": Gpu(24, 165e12),
}


@dataclass(frozen=True)
class PlannedMachine:
    """What a run is planned for.

    Attributes:
        processes: All that train together, one a GPU.
        memory_bytes: Of each process; None where it is not known.
        flops: Operations a second that each process reaches; None where that is not known.
        half: Whether activations are in bf16.
        name: For people.
    """

    processes: int
    memory_bytes: float | None
    flops: float | None
    half: bool
    name: str


def named_machine(text: str) -> PlannedMachine:
    """Return the machine that "NODESxPROCESSES" or "NODESxPROCESSESxGPU" names, such as 4x8xh100.

    Raises:
        ConfigError: It is neither; the message lists the GPUs that are known.
    """
    words = text.lower().split("x", 2)
    if len(words) < 2 or not all(word.isdigit() and int(word) for word in words[:2]) or (words[2:] and words[2] not in GPUS):
        raise ConfigError(
            f"--machine {text}: give NODESxPROCESSES or NODESxPROCESSESxGPU, for example 4x8xh100; GPUs: {', '.join(GPUS)}"
        )
    processes = int(words[0]) * int(words[1])
    if not words[2:]:
        return PlannedMachine(processes, None, None, True, f"{processes} processes on machines that are not known here")
    gpu = GPUS[words[2]]
    return PlannedMachine(processes, gpu.memory_gib * GIB, gpu.reached * gpu.flops, True, f"{processes} x {words[2]}")


def this_machine(config: PretrainConfig, processes: int, measured: bool = True) -> PlannedMachine:
    """Return the machine this command runs on, as the recipe would use it.

    Args:
        config: The recipe.
        processes: How many train together, here and on other machines like this one.
        measured: Measure how fast it multiplies, which takes a moment.
    """
    from meddino.core.device import find_machine
    from meddino_pretrain.monitoring.speed import measure_peak

    machine = find_machine(config.machine.device, config.machine.precision)
    half = machine.compute_dtype == torch.bfloat16
    flops = measure_peak(machine) if measured else None
    if machine.device.type == "cuda":
        properties = torch.cuda.get_device_properties(machine.device)
        reached = None if flops is None else REACHED * flops
        return PlannedMachine(processes, float(properties.total_memory), reached, half, f"{processes} x {properties.name}")
    name = f"{processes} process{'es' if processes > 1 else ''} on {usable_cores()} CPU cores"
    here = min(processes, int(os.environ.get("SLURM_NTASKS_PER_NODE", processes)))
    reached = None if flops is None else REACHED_CPU * flops / here
    return PlannedMachine(processes, _host_memory_bytes() / here, reached, half, name)


def _host_memory_bytes() -> float:
    """Return the memory of this machine, or what a container or a job may take of it."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = limit.read_text().strip() if limit.is_file() else "max"
        if text.isdigit():
            total = min(total, float(text))
    return total


@dataclass(frozen=True)
class StepSize:
    """What one choice of sizes is to a slice.

    Attributes:
        share: Of the steps that take these sizes.
        student: Tokens of each sequence that has a backward pass.
        teacher: Tokens of each sequence of the EMA teacher.
        undistorted: Tokens of each sequence of another frozen teacher.
    """

    share: float
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    undistorted: tuple[int, ...]


@dataclass(frozen=True)
class StageSize:
    """What a stage holds and computes.

    Attributes:
        depth: Blocks of the backbone.
        width: Dimension D of a token.
        backbone_parameters: Number of parameters of the backbone.
        trained: Parameters that are trained.
        frozen: Parameters of all teachers.
        steps: One for each choice of sizes.
    """

    depth: int
    width: int
    backbone_parameters: int
    trained: int
    frozen: int
    steps: tuple[StepSize, ...]

    def memory_bytes(self, slices: int, half: bool, checkpointing: bool, shards: int) -> float:
        """Return what a process takes at most.

        Args:
            slices: In a micro-batch of this process.
            half: Activations in bf16 instead of float32.
            checkpointing: Blocks are computed again in the backward pass.
            shards: Processes over which weights and moments are cut; 1 for copies.
        """
        kept = KEPT_CHECKPOINTED * self.depth + KEPT if checkpointing else KEPT * self.depth
        a_slice = max(kept * sum(step.student) + TEACHER * max(sum(step.teacher), sum(step.undistorted)) for step in self.steps)
        # Weights, gradients and two moments; teachers have weights alone. All in float32.
        states = (16.0 * self.trained + 4.0 * self.frozen) / shards
        return PROCESS_BYTES + states + slices * self.width * a_slice * (1 if half else 2)

    def operations(self) -> float:
        """Return the operations of matrix products for one slice, on average over the choices of sizes."""
        return sum(step.share * self._operations(step) for step in self.steps) / sum(step.share for step in self.steps)

    def checkpoint_bytes(self) -> float:
        """Return the size of a checkpoint: networks and two moments."""
        return 12.0 * self.trained + 4.0 * self.frozen

    def _operations(self, step: StepSize) -> float:
        def forward(sequences: Sequence[int]) -> float:
            attention = 4 * self.width * self.depth
            return sum(tokens * (2 * self.backbone_parameters + attention * tokens) for tokens in sequences)

        heads = 2 * (self.trained - self.backbone_parameters) * (len(step.student) + MASKED * sum(step.teacher))
        return 3 * (forward(step.student) + heads) + forward(step.teacher) + forward(step.undistorted) + heads


@dataclass(frozen=True)
class StagePlan:
    """What a stage would take on a machine.

    Attributes:
        name: The stage.
        steps: Optimizer steps.
        slices: Of a step on each process.
        micro_batch: Slices that are computed at once there.
        memory_bytes: Of each process at most.
        hours: None where the machine's speed is not known.
        disk_bytes: All checkpoints and snapshots that stay.
    """

    name: str
    steps: int
    slices: int
    micro_batch: int
    memory_bytes: float
    hours: float | None
    disk_bytes: float


def plan_run(config: PretrainConfig, machine: PlannedMachine, stages: Sequence[str] = ()) -> list[StagePlan]:
    """Return what each stage would take.

    Args:
        config: The recipe.
        machine: What it would run on.
        stages: Only these; all if empty.

    Raises:
        ConfigError: A batch does not divide, or a stage takes more memory than there is; the message says what to change.
    """
    return [_plan_stage(config, name, machine) for name in stages or config.stages]


def later_steps(config: PretrainConfig, name: str) -> float:
    """Return what the stages after one cost, counted in its own steps, by the operations of their matrix products."""

    def step_operations(stage: str) -> float:
        return stage_size(config, stage).operations() * config.stages[stage].global_batch

    after = list(config.stages)[list(config.stages).index(name) + 1 :]
    return sum(step_operations(stage) * config.stages[stage].steps for stage in after) / step_operations(name)


def _plan_stage(config: PretrainConfig, name: str, machine: PlannedMachine) -> StagePlan:
    stage, size = config.stages[name], stage_size(config, name)
    try:
        micro_batch = BatchShare(stage.global_batch, 0, machine.processes, stage.accumulation).micro_batch
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    shards = machine.processes if config.machine.parallel == "fsdp2" else 1
    checkpointing = config.machine.activation_checkpointing is True
    memory = size.memory_bytes(micro_batch, machine.half, checkpointing, shards)
    if machine.memory_bytes is not None and memory > BEYOND_DOUBT * machine.memory_bytes:
        raise ConfigError(
            f"{name} takes about {memory / GIB:.0f} GiB in each process ({micro_batch} slices at a time); there are "
            f"{machine.memory_bytes / GIB:.0f} GiB ({machine.name}): {_what_fits(config, name, size, machine, shards)}"
        )
    hours = None
    if machine.flops is not None:
        hours = size.operations() * stage.global_batch * stage.steps / (machine.processes * machine.flops) / 3600
    snapshots = 4.0 * size.backbone_parameters * len(config.snapshots(name))
    kept = config.saving.keep_last + (stage.steps // config.saving.keep_every_steps if config.saving.keep_every_steps else 0)
    disk = size.checkpoint_bytes() * min(kept, -(-stage.steps // config.saving.every_steps)) + snapshots
    return StagePlan(name, stage.steps, micro_batch * stage.accumulation, micro_batch, memory, hours, disk)


def _what_fits(config: PretrainConfig, name: str, size: StageSize, machine: PlannedMachine, shards: int) -> str:
    """Return the change of the recipe with which a stage fits, in words."""
    each = config.stages[name].global_batch // machine.processes
    for checkpointing in dict.fromkeys((config.machine.activation_checkpointing is True, True)):
        for slices in (slices for slices in range(each, 0, -1) if each % slices == 0):
            if size.memory_bytes(slices, machine.half, checkpointing, shards) <= (machine.memory_bytes or 0):
                change = f"stages.{name}.accumulation={each // slices}"
                recomputed = checkpointing != config.machine.activation_checkpointing
                return f"it fits with {'machine.activation_checkpointing=true ' if recomputed else ''}{change}"
    return "no accumulation makes it fit; take a smaller recipe (cpu_small, single_gpu), or machine.parallel=fsdp2 on more GPUs"


def plan_lines(plans: Sequence[StagePlan], machine: PlannedMachine) -> Iterator[str]:
    """Yield a plan as a table for people."""
    yield f"plan for {machine.name}, by the arithmetic of docs/scaling.md"
    titles = ("steps", "slices each", "at a time", "memory each", "hours", "checkpoints")
    yield f"{'stage':18} {'{:>8} {:>11} {:>9} {:>11} {:>8} {:>11}'.format(*titles)}"
    for each in plans:
        hours = "?" if each.hours is None else _hours(each.hours)
        yield (
            f"{each.name:18} {each.steps:8} {each.slices:11} {each.micro_batch:9} {each.memory_bytes / GIB:7.1f} GiB "
            f"{hours:>8} {each.disk_bytes / GIB:7.1f} GiB"
        )
    known = [each.hours for each in plans if each.hours is not None]
    total = (
        f"{_hours(sum(known))} h" if len(known) == len(plans) else "hours unknown: name the GPU, --machine NODESxPROCESSESxGPU"
    )
    yield f"in all {total}; {sum(each.disk_bytes for each in plans) / GIB:.1f} GiB of checkpoints stay"


def _hours(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 0.1 else "< 0.1"


def stage_size(config: PretrainConfig, name: str) -> StageSize:
    """Return what a stage holds, from its shapes alone."""
    stage = config.stages[name]
    method = shapes_of(lambda: build_method(config, stage, 0, Machine(torch.device("meta"), torch.float32)))
    backbone, spec = method.export(), method.views(stage.method)
    prefix = 1 + getattr(backbone.config, "num_registers", 0)

    def tokens(px: Mapping[str, int], passes: Callable[[View], int]) -> tuple[int, ...]:
        return tuple(
            (px[view] // backbone.patch_size) ** 2 + prefix
            for view, kind in spec.views.items()
            for _ in range(kind.count * passes(kind))
        )

    steps = tuple(
        StepSize(
            sizes.weight,
            tokens(sizes.px, lambda kind: int(kind.trained)),
            tokens(sizes.px, lambda kind: kind.frozen if kind.trained else 0),
            tokens(sizes.px, lambda kind: 0 if kind.trained else kind.frozen),
        )
        for sizes in spec.sizes
    )
    trained = _parameters(method.model)
    frozen = sum(_parameters(network) for network in method.networks().values()) - trained
    return StageSize(backbone.depth, backbone.embed_dim, _parameters(backbone), trained, frozen, steps)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def show_plan(
    config: PretrainConfig,
    corpora: Sequence[Path | str],
    out: Path,
    stages: Sequence[str],
    machine: PlannedMachine,
    corpus_comes: bool = False,
    warn_disk: bool = False,
) -> Iterator[str]:
    """Check all that a run needs and yield what it would take, as lines for people.

    Args:
        config: The recipe.
        corpora: Corpora, or their URLs.
        out: The run's folder.
        stages: Only these; all if empty.
        machine: What it would run on.
        corpus_comes: A corpus may not be there yet.
        warn_disk: A lack of room for the checkpoints is a line of the plan, no refusal.

    Raises:
        MedDINOError: What the run itself would end with: wrong corpus or weights, no room in memory or on the disk.
    """
    config.check_stages(stages)
    specs = check_views(config)
    plans = plan_run(config, machine, stages)
    if any(config.stages[each.name].starts_from is None for each in plans):
        yield (
            f"weights: {config.init.weights} fits"
            if read_init(config) is not None
            else "weights: fresh ones, drawn from the seed"
        )
    coming = [corpus for corpus in corpora if corpus_comes and isinstance(corpus, Path) and not corpus.exists()]
    if coming:
        yield f"corpus: {coming[0]} is not there yet; it is checked when the run begins"
    else:
        found = open_corpora(corpora)
        check_corpus(found, config, largest_px(specs))
        seen = sum(config.stages[each.name].global_batch * each.steps for each in plans)
        learnt = int((~slices_left_out(found, config.corpus.sampling)).sum())
        yield f"corpus: {learnt:,} slices, each is seen about {seen / learnt:,.0f} times"
        yield from (f"corpus: {line}" for line in weight_warnings(found, config))
    for name, stage in ((each.name, config.stages[each.name]) for each in plans):
        if stage.snapshots_beyond:
            yield f"snapshots: {name} keeps none after {stage.snapshots_beyond}, which lie beyond its {stage.steps} steps"
    yield from plan_lines(plans, machine)
    try:
        _check_room(out, sum(each.disk_bytes for each in plans))
    except MedDINOError as error:
        if not warn_disk:
            raise
        yield f"disk: {error}"


def _check_room(out: Path, disk_bytes: float) -> None:
    """Refuse a run whose checkpoints have no room beside what it wrote before."""
    written = sum(size for path, size in sizes_below(out) if path.suffix == ".safetensors")
    check_free_space(out, max(0, int(disk_bytes) - written), "the run's checkpoints")
