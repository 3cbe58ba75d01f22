"""Backbone and two heads: what student and teacher both are, and what each computes from a batch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meddino.core.device import at_least_float32
from meddino.distributed.collectives import all_gather_with_grad, rank
from meddino.layers.drop_path import DropPathPlan
from meddino.layers.projection_head import ProjectionHead
from meddino.losses.dino import dino_terms
from meddino.losses.gram import Negatives, gram_loss
from meddino.losses.ibot import ibot_term
from meddino.losses.koleo import koleo_loss
from meddino.losses.sinkhorn import SinkhornTargets
from meddino.models.backbone import BackboneOutput
from meddino.models.vision_transformer import VisionTransformer
from meddino_pretrain.data.batches import Batch
from meddino_pretrain.methods.dinov3.config import GLOBAL_CROPS
from meddino_pretrain.methods.dinov3.views import GLOBAL, LOCAL, MASK_INDICES, MASK_WEIGHTS, MASKS


@dataclass(frozen=True)
class KoLeoGradient:
    """KoLeo over more images than one micro-batch: its value, and its gradient at this micro-batch's CLS tokens.

    Attributes:
        value: The loss of the whole batch.
        gradient: [2 B, D], scaled so that its mean over micro-batches is the loss's gradient.
    """

    value: Float[Tensor, ""]
    gradient: Float[Tensor, "gb d"]


@dataclass(frozen=True)
class InitialTokens:
    """The tokens that the stage's first backbone gives for the unmasked global crops.

    Attributes:
        kind: "l2" holds the tokens, "gram" the patches' similarities.
        cls_token: [2 B, D].
        patch_tokens: [2 B, N, D].
    """

    kind: Literal["l2", "gram"]
    cls_token: Float[Tensor, "gb d"]
    patch_tokens: Float[Tensor, "gb n d"]

    def loss(self, seen: BackboneOutput, masks: Bool[Tensor, "gb n"]) -> Float[Tensor, ""]:
        """Return how far the student's tokens went: mean squared difference over CLS tokens and patches it sees."""
        if self.kind == "gram":
            return gram_loss(seen.patch_tokens, self.patch_tokens)
        of_cls = (at_least_float32(seen.cls_token) - self.cls_token).square().mean()
        of_patches = (at_least_float32(seen.patch_tokens) - self.patch_tokens).square().mean(dim=-1)
        visible = (~masks).to(of_patches.dtype)
        return of_cls + (of_patches * visible).sum() / visible.sum().clamp(min=1.0)


@dataclass(frozen=True)
class Targets:
    """What the student shall match in one micro-batch.

    Attributes:
        plan: What drop path leaves out.
        cls: The teacher's assignments of the 2 B global crops, crop-major.
        patches: The teacher's assignments of the M masked patches.
        gram_tokens: [2 B, N, D] patch tokens of the Gram teacher at the student's grid, or None.
        initial: What the student is to stay near to, or None.
        koleo: Given where the batch is cut into several micro-batches; else KoLeo is computed in place.
        weights: What each term is multiplied by in the total; see `LossesConfig.weights`.
        student_temperature: Of the student's softmax.
        gram_negatives: What becomes of negative similarities.
    """

    plan: DropPathPlan
    cls: SinkhornTargets
    patches: SinkhornTargets
    gram_tokens: Float[Tensor, "gb n d"] | None
    initial: InitialTokens | None
    koleo: KoLeoGradient | None
    weights: Mapping[str, float]
    student_temperature: float
    gram_negatives: Negatives


class DINOv3Network(nn.Module):
    """A backbone with a head for CLS tokens and one for masked patches; its `forward` is the student's whole computation."""

    forward_methods = ("target_bottlenecks", "probe", "global_cls")

    def __init__(self, backbone: VisionTransformer, dino_head: ProjectionHead, ibot_head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def forward(self, batch: Batch, targets: Targets) -> dict[str, Float[Tensor, ""]]:
        """Return the student's terms on one micro-batch, unweighted, and their weighted "total", which has the gradient."""
        kinds = [GLOBAL, LOCAL] if LOCAL in batch.views else [GLOBAL]
        masks = [batch.extras[MASKS], None][: len(kinds)]
        # No name for the crops: they are gone when the losses begin.
        outputs = self.backbone.forward_crops([batch.take(kind) for kind in kinds], masks, plan=targets.plan)
        seen, weights, temperature = outputs[0], targets.weights, targets.student_temperature
        # The heads stop at the bottleneck: the losses go from there to the prototypes a chunk of rows at a time.
        # Rows without gaps: compiled heads would take other strides for another kind of input.
        bottlenecks = [self.dino_head(output.cls_token.contiguous(), no_last_layer=True) for output in outputs]
        dim = bottlenecks[0].shape[-1]
        local_bottleneck = bottlenecks[1] if len(bottlenecks) > 1 else bottlenecks[0][:0]
        dino = dino_terms(
            bottlenecks[0].view(GLOBAL_CROPS, len(batch.keys), dim),
            local_bottleneck.view(-1, len(batch.keys), dim),
            self.dino_head.last_layer.weight,
            targets.cls,
            temperature,
            weights["dino_global"],
            weights["dino_local"],
        )
        masked = seen.patch_tokens.flatten(0, 1)[batch.extras[MASK_INDICES]]
        ibot = ibot_term(
            self.ibot_head(masked, no_last_layer=True),
            self.ibot_head.last_layer.weight,
            targets.patches,
            batch.extras[MASK_WEIGHTS],
            len(seen.cls_token),
            temperature,
        )
        terms = {"ibot": ibot, "koleo": self._koleo(seen.cls_token, targets.koleo)}
        if targets.gram_tokens is not None:
            terms["gram"] = gram_loss(seen.patch_tokens, targets.gram_tokens, negatives=targets.gram_negatives)
        if targets.initial is not None:
            terms["distill_to_init"] = targets.initial.loss(seen, batch.extras[MASKS])
        total = dino.weighted
        for name, term in terms.items():
            total = total + weights[name] * term
        terms = {"dino_global": dino.global_crops, "dino_local": dino.local_crops, **terms}
        return {**{name: term.detach() for name, term in terms.items()}, "total": total}

    @torch.no_grad()
    def target_bottlenecks(self, batch: Batch) -> tuple[Float[Tensor, "gb d"], Float[Tensor, "m d"]]:
        """Return what the teacher's logits come from: of all global crops (unmasked), and of the student's masked patches.

        The logits of all prototypes and micro-batches at once would be the largest tensors of a step.
        """
        seen = self.backbone(batch.views[GLOBAL])
        masked = seen.patch_tokens.flatten(0, 1)[batch.extras[MASK_INDICES]]
        return self.dino_head(seen.cls_token.contiguous(), no_last_layer=True), self.ibot_head(masked, no_last_layer=True)

    @torch.no_grad()
    def probe(
        self, images: Float[Tensor, "n c h w"], every: int
    ) -> tuple[BackboneOutput, Float[Tensor, "n k"], Float[Tensor, "m k2"]]:
        """Return what the backbone sees, the logits of the CLS tokens, and those of every so many-th patch of each image."""
        seen: BackboneOutput = self.backbone(images)
        patches = seen.patch_tokens[:, ::every].flatten(0, 1)
        return seen, at_least_float32(self.dino_head(seen.cls_token.contiguous())), at_least_float32(self.ibot_head(patches))

    @torch.no_grad()
    def global_cls(self, batch: Batch, plan: DropPathPlan) -> Float[Tensor, "gb d"]:
        """Return the student's CLS tokens of the masked global crops as `forward` will compute them."""
        alone = replace(plan, groups=plan.groups[:1])
        cls_token: Tensor = self.backbone(batch.views[GLOBAL], batch.extras[MASKS], plan=alone).cls_token
        return at_least_float32(cls_token)

    @staticmethod
    def _koleo(cls_token: Tensor, whole: KoLeoGradient | None) -> Tensor:
        if whole is None:
            return mean_koleo(cls_token)
        # The value of the whole batch with this micro-batch's share of its gradient.
        moved = (at_least_float32(cls_token) * whole.gradient).sum()
        return whole.value + moved - moved.detach()


def mean_koleo(cls_token: Float[Tensor, "gb d"]) -> Float[Tensor, ""]:
    """Return the mean over both global crops of KoLeo among the images of each, neighbours from all processes."""
    terms = []
    for crop in cls_token.chunk(GLOBAL_CROPS):
        everyone = all_gather_with_grad(at_least_float32(crop))
        terms.append(koleo_loss(crop, everyone=everyone, first=rank() * len(crop)))
    return torch.stack(terms).mean()
