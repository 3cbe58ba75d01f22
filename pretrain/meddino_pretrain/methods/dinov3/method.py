"""DINOv3's method: DINO between crops, iBOT on masked patches, KoLeo, and Gram anchoring to an earlier teacher."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meddino.checkpoints.state.training_state import load_training_state
from meddino.core.device import at_least_float32
from meddino.core.errors import ConfigError
from meddino.distributed.parallel import whole
from meddino.layers.drop_path import CropIndices, DropPathPlan
from meddino.layers.projection_head import ProjectionHead
from meddino.losses.gram import resize_patch_map
from meddino.losses.sinkhorn import SinkhornTargets, TeacherLogits, sinkhorn_targets
from meddino.models.backbone import Backbone
from meddino.models.vision_transformer import VisionTransformer
from meddino_pretrain.data.batches import Batch, RawBatch
from meddino_pretrain.data.sampler import SampleOrder
from meddino_pretrain.data.views import ViewSpec
from meddino_pretrain.methods.base import KeptChoice, Method, ProbeOutput, StageSetting, count_flops, on_meta
from meddino_pretrain.methods.dinov3.config import GLOBAL_CROPS, DINOv3Config, HeadConfig
from meddino_pretrain.methods.dinov3.gram_choice import choose_gram_teacher
from meddino_pretrain.methods.dinov3.network import (
    DINOv3Network,
    InitialTokens,
    KoLeoGradient,
    Targets,
    mean_koleo,
)
from meddino_pretrain.methods.dinov3.views import GLOBAL, GRAM, LOCAL, MASK_INDICES, add_masks, crop_views
from meddino_pretrain.methods.ema import update_teacher
from meddino_pretrain.schedules import StepValues, cosine, linear

LAST_LAYER = "last_layer"
_EVERY_PATCH = 8  # of a probe goes through the head: the logits of all at 65,536 prototypes would be gigabytes


class DINOv3(Method):
    """Student, EMA teacher and, where the recipe asks for them, frozen teachers; see `Method`."""

    lr_schedules = (LAST_LAYER,)

    def __init__(
        self,
        student: DINOv3Network,
        teacher: DINOv3Network,
        config: DINOv3Config,
        setting: StageSetting,
        gram_teacher: VisionTransformer | None = None,
        initial_teacher: VisionTransformer | None = None,
    ) -> None:
        """Take finished networks.

        Args:
            student: Backbone and heads that the optimizer updates.
            teacher: Follows it; is put into evaluation mode and never gets a gradient.
            config: Weights, temperatures, momentum.
            setting: The stage.
            gram_teacher: Frozen backbone whose patch similarities anchor the student's.
            initial_teacher: Frozen backbone that the stage began with, where the recipe distils from it.
        """
        if config.losses.gram_weight > 0 and gram_teacher is None:
            raise ValueError("gram_weight is above 0 and there is no Gram teacher")
        if config.losses.distill_to_init_weight > 0 and initial_teacher is None:
            raise ValueError("distill_to_init_weight is above 0 and there is no backbone to stay near")
        self.model = self.called = self.student = student
        self.teacher, self.gram_teacher, self.initial_teacher = teacher, gram_teacher, initial_teacher
        self.config, self.setting, self.machine = config, setting, setting.machine
        for frozen in (teacher, gram_teacher, initial_teacher):
            if frozen is not None:
                frozen.eval().requires_grad_(False)
        self._observed: dict[str, Tensor] = {}
        self._temperature = self.scheduled(0)["teacher_temperature"]

    @classmethod
    def views(cls, config: DINOv3Config) -> ViewSpec:
        """See `Method`."""
        return crop_views(config.crops)

    @classmethod
    def collate(cls, config: DINOv3Config, patch_px: int, raw: RawBatch, order: SampleOrder) -> RawBatch:
        """See `Method`: masks."""
        return add_masks(config.masking, patch_px, raw, order)

    @classmethod
    def build(cls, config: DINOv3Config, backbone: Backbone, setting: StageSetting) -> "DINOv3":
        """See `Method`."""
        if not isinstance(backbone, VisionTransformer):
            raise ConfigError(
                f"method dinov3 masks patches, for which it needs a vision transformer; backbone is a {type(backbone).__name__}"
            )
        student = DINOv3Network(
            backbone, _head(backbone.embed_dim, config.heads.dino), _head(backbone.embed_dim, config.heads.ibot)
        )
        teacher = copy.deepcopy(student)
        gram_teacher = copy.deepcopy(backbone) if config.gram_teacher is not None else None
        initial_teacher = copy.deepcopy(backbone) if config.losses.distill_to_init_weight > 0 else None
        return cls(student, teacher, config, setting, gram_teacher, initial_teacher)

    @classmethod
    def choose_kept(cls, config: DINOv3Config, scores: Mapping[int, Float[Tensor, " n"]]) -> KeptChoice:
        """See `Method`."""
        if config.gram_teacher is None:
            raise ValueError("there is no Gram teacher to choose")
        return choose_gram_teacher(scores, config.gram_teacher.choice)

    def networks(self) -> Mapping[str, nn.Module]:
        """See `Method`."""
        networks: dict[str, nn.Module | None] = {
            "student": self.student,
            "teacher": self.teacher,
            "gram_teacher": self.gram_teacher,
            "initial_teacher": self.initial_teacher,
        }
        return {name: network for name, network in networks.items() if network is not None}

    def parts(self) -> list[nn.Module]:
        """See `Method`: the heads too."""
        heads = [head for network in (self.student, self.teacher) for head in (network.dino_head, network.ibot_head)]
        return [*super().parts(), *heads]

    def export(self) -> VisionTransformer:
        """See `Method`."""
        return self.teacher.backbone

    def load_stage(self, folder: Path, kept: Path | None) -> None:
        """See `Method`: student, teacher and heads; the backbone to stay near is that teacher's."""
        load_training_state(folder, {"student": self.student, "teacher": self.teacher})
        if self.initial_teacher is not None:
            load_training_state(folder, {"teacher.backbone": self.initial_teacher})
        if kept is not None and self.gram_teacher is not None:
            load_training_state(kept, {"backbone": self.gram_teacher})

    def scheduled(self, step: int) -> Mapping[str, float]:
        """See `Method`."""
        teacher = self.config.teacher
        return {
            "ema_momentum": cosine(teacher.ema_momentum, teacher.ema_momentum_end, step / self.setting.steps),
            "teacher_temperature": linear(
                teacher.temperature_start, teacher.temperature, step, teacher.temperature_warmup_steps
            ),
        }

    def lr_multipliers(self, step: int) -> Mapping[str, float]:
        """See `Method`: the prototypes stand still at first."""
        return {LAST_LAYER: float(step >= self.config.freeze_last_layer_steps)}

    @torch.no_grad()
    def targets(self, batches: Sequence[Batch], values: StepValues, step: int) -> Iterator[Targets]:
        """See `Method`."""
        self._temperature = values.own["teacher_temperature"]
        plans = [self._plan(batch, step) for batch in batches]
        with self.machine.autocast():
            bottlenecks = [self.teacher.target_bottlenecks(batch) for batch in batches]
        # Sinkhorn's equal shares hold over the whole batch: all micro-batches here, all processes inside.
        dtype = self.machine.compute_dtype
        cls = _joint_targets(self.teacher.dino_head, [part for part, _ in bottlenecks], self._temperature, dtype)
        # Gigabytes are in the patches' alone.
        give_up = self.student.backbone.recomputes and self.machine.is_accelerator
        patches = _joint_targets(self.teacher.ibot_head, [part for _, part in bottlenecks], self._temperature, dtype, give_up)
        self._observed = _observe(cls)
        koleo = self._koleo_gradients(batches, plans)
        shared = [[*each] for each in (plans, cls, patches, koleo)]

        def each() -> Iterator[Targets]:
            for batch in batches:  # popped: whoever asks is the only one to hold them
                yield self._target(batch, *(parts.pop(0) for parts in shared))

        del cls, patches, koleo
        return each()

    def after_step(self, values: StepValues) -> None:
        """See `Method`."""
        update_teacher(self.student, self.teacher, values.own["ema_momentum"])

    def observations(self) -> Mapping[str, Tensor]:
        """See `Method`: the mean entropy of the targets and the share of prototypes that are some target's largest."""
        return self._observed

    def probe(self, images: Float[Tensor, "n c h w"]) -> ProbeOutput:
        """See `Method`; how the teacher assigns tokens to prototypes tells a collapse of its heads."""
        seen, cls_logits, patch_logits = self.teacher.probe(images, _EVERY_PATCH)
        logits = {"cls": cls_logits, "patch": patch_logits}
        assignments = {name: each.float() / self._temperature for name, each in logits.items()}
        return ProbeOutput(seen.cls_token, seen.patch_map, assignments)

    def flops(self, batch: Batch) -> float:
        """See `Method`: the student three times, the teachers once; drop path is not taken off."""
        views, student = on_meta(batch), self.student

        def count(crops: Tensor, masked: int) -> float:
            def work() -> None:
                seen = student.backbone(crops)
                if masked >= 0:
                    student.dino_head(seen.cls_token)
                    student.ibot_head(torch.empty(masked, seen.cls_token.shape[1], device="meta"))

            return count_flops(work)

        of_global = count(views[GLOBAL], len(batch.extras[MASK_INDICES]))
        of_local = count(views[LOCAL], 0) if LOCAL in views else 0.0
        of_gram = count(views[GRAM], -1) if self.gram_teacher is not None and GRAM in views else 0.0
        return 3 * (of_global + of_local) + of_global + of_gram

    @torch.no_grad()
    def _target(
        self, batch: Batch, plan: DropPathPlan, cls: SinkhornTargets, patches: SinkhornTargets, koleo: KoLeoGradient | None
    ) -> Targets:
        """Complete what one micro-batch shall match by what the frozen teachers see in it."""
        losses = self.config.losses
        with self.machine.autocast():
            gram, initial = self._gram_tokens(batch), self._initial_tokens(batch)
        weights = losses.weights(_num_local(batch))
        fixed = (weights, losses.student_temperature, losses.gram_negatives)
        return Targets(plan, cls, patches, gram, initial, koleo, *fixed)

    def _plan(self, batch: Batch, step: int) -> DropPathPlan:
        share = self.setting.share
        samples = share.samples(batch.micro_step)
        groups = [CropIndices.of_samples(GLOBAL_CROPS, samples, share.global_batch)]
        if LOCAL in batch.views:
            groups.append(CropIndices.of_samples(_num_local(batch), samples, share.global_batch))
        return DropPathPlan(self.setting.seed, step, tuple(groups))

    def _initial_tokens(self, batch: Batch) -> InitialTokens | None:
        if self.initial_teacher is None:
            return None
        seen = self.initial_teacher(batch.views[GLOBAL])
        kind = self.config.losses.distill_to_init
        return InitialTokens(kind, at_least_float32(seen.cls_token), at_least_float32(seen.patch_tokens))

    def _gram_tokens(self, batch: Batch) -> Tensor | None:
        if self.config.losses.gram_weight == 0 or self.gram_teacher is None or GRAM not in batch.views:
            return None
        seen = self.gram_teacher(batch.take(GRAM))
        side = self.student.backbone.patch_size
        height, width = batch.shapes[GLOBAL][-2:]
        tokens = at_least_float32(seen.patch_tokens)
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *seen.grid)
        return resize_patch_map(maps, (height // side, width // side)).flatten(2).transpose(1, 2)

    def _koleo_gradients(self, batches: Sequence[Batch], plans: Sequence[DropPathPlan]) -> list[KoLeoGradient | None]:
        if len(batches) == 1:
            return [None]
        # An image's nearest neighbour may lie in another micro-batch: the CLS tokens of all are computed once without a
        # gradient, KoLeo's gradient is taken at them, and each micro-batch's backward pass carries its share on.
        with self.machine.autocast():
            parts = [self.student.global_cls(batch, plan) for batch, plan in zip(batches, plans, strict=True)]
        stacked = torch.stack([part.view(GLOBAL_CROPS, -1, part.shape[-1]) for part in parts], dim=1)  # [2, A, B, D]
        with torch.enable_grad():
            leaf = stacked.flatten(1, 2).flatten(0, 1).requires_grad_(True)  # [2 A B, D], crop-major
            value = mean_koleo(leaf)
            (gradient,) = torch.autograd.grad(value, leaf)
        shares = gradient.view_as(stacked) * len(batches)
        return [KoLeoGradient(value.detach(), shares[:, number].flatten(0, 1)) for number in range(len(batches))]


def _num_local(batch: Batch) -> int:
    return batch.shapes[LOCAL][0] // len(batch.keys) if LOCAL in batch.views else 0


def _head(in_dim: int, config: HeadConfig) -> ProjectionHead:
    return ProjectionHead(
        in_dim, config.prototypes, config.hidden_dim, config.bottleneck_dim, config.layers, config.unit_prototypes
    )


def _joint_targets(
    head: ProjectionHead, parts: list[Tensor], temperature: float, dtype: torch.dtype, give_up_kernel: bool = False
) -> list[SinkhornTargets]:
    """Balance the teacher's logits of all micro-batches together, and return each one's targets."""
    bottleneck = parts[0] if len(parts) == 1 else torch.cat(parts)
    # Gathered here: inside the network's own forward FSDP2 lends a weight that is gone afterwards.
    logits = TeacherLogits(bottleneck, whole(head.last_layer.weight), dtype)
    joint = sinkhorn_targets(logits, temperature, give_up_kernel=give_up_kernel)
    ends = list(itertools.accumulate(len(part) for part in parts))
    return [joint.rows(end - len(part), end) for end, part in zip(ends, parts, strict=True)]


def _observe(targets: Sequence[SinkhornTargets]) -> dict[str, Float[Tensor, ""]]:
    # One micro-batch of this process is enough to see a collapse, and costs little.
    probabilities = targets[0].probabilities()
    entropy = -torch.xlogy(probabilities, probabilities).sum(dim=-1).mean()
    used = torch.zeros(probabilities.shape[-1], device=probabilities.device)
    used[probabilities.argmax(dim=-1)] = 1.0
    return {"teacher_entropy": entropy, "prototypes_used": used.mean()}
