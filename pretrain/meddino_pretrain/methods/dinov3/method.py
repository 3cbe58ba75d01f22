"""DINOv3's objective: DINO between crops, iBOT on masked patches, KoLeo, and Gram anchoring to an earlier teacher."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meddino.core.device import Machine
from meddino.core.precision import at_least_float32
from meddino.distributed.parallel import gradient_sync, whole
from meddino.layers.drop_path import CropIndices, DropPathPlan
from meddino.layers.projection_head import ProjectionHead
from meddino.losses.gram import resize_patch_map
from meddino.losses.sinkhorn import SinkhornTargets, TeacherLogits, sinkhorn_targets
from meddino.models.vision_transformer import VisionTransformer
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.data.crops import GLOBAL_CROPS
from meddino_pretrain.data.sampler import BatchShare
from meddino_pretrain.methods.base import Losses, Views
from meddino_pretrain.methods.dinov3.config import DINOv3Config
from meddino_pretrain.methods.dinov3.network import DINOv3Network, KoLeoPull, Leash, Targets, TermWeights, mean_koleo
from meddino_pretrain.methods.ema import update_teacher
from meddino_pretrain.schedules import StepValues


class DINOv3Objective:
    """Student, teacher and, from the second stage on, a Gram teacher; see `Objective`."""

    def __init__(
        self,
        student: DINOv3Network,
        teacher: DINOv3Network,
        gram_teacher: VisionTransformer | None,
        config: DINOv3Config,
        machine: Machine,
        share: BatchShare,
        seed: int,
        called: nn.Module | None = None,
        leash_teacher: VisionTransformer | None = None,
    ) -> None:
        """Take finished networks.

        Args:
            student: Trained.
            teacher: Follows it; is put into evaluation mode and never gets a gradient.
            gram_teacher: Frozen backbone whose patch similarities anchor the student's.
            config: Weights of the terms.
            machine: Where and in which arithmetic forward passes run.
            share: Which samples of a step are in which micro-batch of this process.
            seed: The stage's seed, for what is random in the student's forward pass.
            called: The student behind a wrapper that exchanges gradients; the student itself if None.
            leash_teacher: Frozen backbone that the stage began with, where the recipe has a leash.
        """
        if config.gram_weight > 0 and gram_teacher is None:
            raise ValueError("gram_weight is above 0 and there is no Gram teacher")
        if config.leash_weight > 0 and leash_teacher is None:
            raise ValueError("leash_weight is above 0 and there is no backbone to stay near")
        self.student, self.teacher, self.gram_teacher, self.leash_teacher = student, teacher, gram_teacher, leash_teacher
        self.config, self.machine, self.share, self.seed = config, machine, share, seed
        self.called = called if called is not None else student
        self.teacher.eval().requires_grad_(False)
        for frozen in (gram_teacher, leash_teacher):
            if frozen is not None:
                frozen.eval().requires_grad_(False)
        self._observed: dict[str, Tensor] = {}

    @property
    def views(self) -> Views:
        """See `Objective`."""
        return Views(local_crops=True, masks=True, gram_teacher_crops=self.config.gram_weight > 0)

    @property
    def trained(self) -> Mapping[str, nn.Module]:
        """See `Objective`."""
        return dict(self.student.named_children())

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """See `Objective`."""
        networks: dict[str, nn.Module | None] = {
            "student": self.student,
            "teacher": self.teacher,
            "gram_teacher": self.gram_teacher,
            "leash_teacher": self.leash_teacher,
        }
        return {name: network for name, network in networks.items() if network is not None}

    def losses(self, batches: Sequence[Batch], values: StepValues, step: int) -> Iterator[Losses]:
        """See `Objective`. Terms: dino_global, dino_local, ibot, koleo, gram (unweighted), and total (weighted)."""
        self.student.train()
        draws = [self._draws(batch, step) for batch in batches]
        targets = self._targets(batches, draws, values.teacher_temperature)
        for number, (batch, draw) in enumerate(zip(batches, draws, strict=True)):
            # Held open while the caller goes backward, which is when gradients are exchanged.
            with gradient_sync(self.called, number == len(batches) - 1), self.machine.autocast():
                losses: Losses = self.called(
                    batch,
                    targets.pop(0),  # the graph alone holds them now, and lets go as soon as it has used them
                    draw,
                    self._weights(len(batch.local_crops) // len(batch.keys)),
                    self.config.student_temperature,
                    self.config.gram_negatives,
                )
                yield losses

    def after_step(self, values: StepValues) -> None:
        """See `Objective`."""
        update_teacher(self.student, self.teacher, values.ema_momentum)

    def observations(self) -> Mapping[str, Tensor]:
        """See `Objective`: the mean entropy of the targets and the share of prototypes that are some target's largest."""
        return self._observed

    def _weights(self, num_local: int) -> TermWeights:
        # Every pair of a teacher crop and another student crop weighs the same.
        global_pairs, local_pairs = GLOBAL_CROPS * (GLOBAL_CROPS - 1), GLOBAL_CROPS * num_local
        pairs = global_pairs + local_pairs
        return TermWeights(
            dino_global=self.config.dino_weight * global_pairs / pairs,
            dino_local=self.config.dino_weight * self.config.dino_local_multiplier * local_pairs / pairs,
            ibot=self.config.ibot_weight,
            koleo=self.config.koleo_weight * GLOBAL_CROPS,
            gram=self.config.gram_weight,
            leash=self.config.leash_weight,
        )

    def _draws(self, batch: Batch, step: int) -> DropPathPlan:
        samples = self.share.places(batch.micro_step)
        groups = [CropIndices.of_samples(GLOBAL_CROPS, samples, self.share.global_batch)]
        if len(batch.local_crops):
            num_local = len(batch.local_crops) // len(batch.keys)
            groups.append(CropIndices.of_samples(num_local, samples, self.share.global_batch))
        return DropPathPlan(self.seed, step, tuple(groups))

    @torch.no_grad()
    def _targets(self, batches: Sequence[Batch], draws: Sequence[DropPathPlan], temperature: float) -> list[Targets]:
        with self.machine.autocast():
            bottlenecks = [self.teacher.target_bottlenecks(batch) for batch in batches]
            gram = [self._gram_tokens(batch) for batch in batches]
            leash = [self._leash(batch) for batch in batches]
        # Sinkhorn's equal shares hold over the whole batch: all micro-batches here, all processes inside.
        dtype = self.machine.compute_dtype
        cls = _joint_targets(self.teacher.dino_head, [part for part, _ in bottlenecks], temperature, dtype)
        patches = _joint_targets(self.teacher.ibot_head, [part for _, part in bottlenecks], temperature, dtype)
        self._observed = _observe(cls)
        pulls = self._koleo_pulls(batches, draws)
        return [Targets(*parts) for parts in zip(cls, patches, gram, leash, pulls, strict=True)]

    def _leash(self, batch: Batch) -> Leash | None:
        if self.leash_teacher is None:
            return None
        seen = self.leash_teacher(batch.global_crops)
        return Leash(self.config.leash, at_least_float32(seen.cls_token), at_least_float32(seen.patch_tokens))

    def _gram_tokens(self, batch: Batch) -> Tensor | None:
        if self.config.gram_weight == 0 or self.gram_teacher is None or batch.gram_teacher_crops is None:
            return None
        seen = self.gram_teacher(batch.gram_teacher_crops)
        side = self.student.backbone.patch_size
        grid = (batch.global_crops.shape[-2] // side, batch.global_crops.shape[-1] // side)
        tokens = at_least_float32(seen.patch_tokens)
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *seen.grid)
        return resize_patch_map(maps, grid).flatten(2).transpose(1, 2)

    def _koleo_pulls(self, batches: Sequence[Batch], draws: Sequence[DropPathPlan]) -> list[KoLeoPull | None]:
        if len(batches) == 1:
            return [None]
        # An image's nearest neighbour may lie in another micro-batch: the CLS tokens of all are computed once without a
        # gradient, KoLeo's gradient is taken at them, and each micro-batch's backward pass carries its share on.
        with self.machine.autocast():
            parts = [self.student.global_cls(batch, draw) for batch, draw in zip(batches, draws, strict=True)]
        stacked = torch.stack([part.view(GLOBAL_CROPS, -1, part.shape[-1]) for part in parts], dim=1)  # [2, A, B, D]
        with torch.enable_grad():
            leaf = stacked.flatten(1, 2).flatten(0, 1).requires_grad_(True)  # [2 A B, D], crop-major
            value = mean_koleo(leaf)
            (gradient,) = torch.autograd.grad(value, leaf)
        shares = gradient.view_as(stacked) * len(batches)
        return [KoLeoPull(value.detach(), shares[:, number].flatten(0, 1)) for number in range(len(batches))]


def _joint_targets(head: ProjectionHead, parts: list[Tensor], temperature: float, dtype: torch.dtype) -> list[SinkhornTargets]:
    """Balance the teacher's logits of all micro-batches together, and return each one's targets."""
    bottleneck = parts[0] if len(parts) == 1 else torch.cat(parts)
    # Gathered here: inside the network's own forward FSDP2 lends a weight that is gone afterwards.
    joint = sinkhorn_targets(TeacherLogits(bottleneck, whole(head.last_layer.weight), dtype), temperature)
    ends = list(itertools.accumulate(len(part) for part in parts))
    return [joint.rows(end - len(part), end) for end, part in zip(ends, parts, strict=True)]


def _observe(targets: Sequence[SinkhornTargets]) -> dict[str, Float[Tensor, ""]]:
    # A look at one micro-batch of this process is enough to see a collapse, and costs little.
    probabilities = targets[0].probabilities()
    entropy = -torch.xlogy(probabilities, probabilities).sum(dim=-1).mean()
    used = torch.zeros(probabilities.shape[-1], device=probabilities.device)
    used[probabilities.argmax(dim=-1)] = 1.0
    return {"teacher_entropy": entropy, "prototypes_used": used.mean()}
