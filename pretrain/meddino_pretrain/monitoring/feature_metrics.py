"""How a run is doing, from the features of fixed slices alone: no labels."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from meddino.core.device import Machine
from meddino.core.errors import CheckpointError
from meddino.core.files import atomic_write
from meddino.distributed.collectives import is_main
from meddino.models.backbone import Backbone
from meddino_pretrain.methods.base import ProbeOutput
from meddino_pretrain.monitoring.config import ProbeConfig
from meddino_pretrain.monitoring.fixed_slices import FixedSlices

_CHUNK = 4  # slices in one forward pass: small enough for any machine that can train
_PATCHES_FOR_RANK = 2048
_NEIGHBOURS = 3


class FeatureProbe:
    """Measures a method's features on fixed slices, and against how they were when they were first measured."""

    def __init__(self, fixed: FixedSlices, config: ProbeConfig, machine: Machine, reference: Path) -> None:
        """Keep what is needed for a probe.

        Args:
            fixed: The slices.
            config: How often.
            machine: Where the networks are.
            reference: File of the first probe's features: written by the first process at the first probe, read later, so
                that a resumed run goes on comparing with the same features.
        """
        self.fixed, self.config, self.machine, self.reference = fixed, config, machine, reference
        self._first: dict[str, Tensor] | None = None

    def due(self, step: int) -> bool:
        """Tell whether features shall be measured after this step."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    @torch.no_grad()
    def measure(self, see: Callable[[Tensor], ProbeOutput]) -> dict[str, float]:
        """Measure the features. Every process must call it; the numbers are the same in all.

        Args:
            see: `Method.probe`.

        Returns:
            Numbers whose names begin with "features/"; `MEANINGS` says what each means.

        Raises:
            CheckpointError: The file of the first probe is damaged or belongs to other slices or another model.
        """
        uses: dict[str, AssignmentUse] = {}
        cls_parts, patch_parts, scores = [], [], []
        for start in range(0, len(self.fixed), _CHUNK):
            first, second = (self._seen(see, view, start) for view in (self.fixed.first_view, self.fixed.second_view))
            for name, logits in first.assignments.items():
                uses.setdefault(name, AssignmentUse()).add(logits)
            cls_parts.append(first.cls_token.float().cpu())
            if first.patch_map is not None and second.patch_map is not None:
                body = self.fixed.body[start : start + _CHUNK]
                scores.append(patch_consistency(first.patch_map, second.patch_map, body).cpu())
                patch_parts.append(first.patch_map.float().flatten(2).transpose(1, 2).contiguous().cpu())
        tokens = {"cls_tokens": torch.cat(cls_parts)}
        if patch_parts:
            tokens["patch_tokens"] = torch.cat(patch_parts)
        numbers = {f"{name}_{key}": value for name, use in uses.items() for key, value in use.numbers().items()}
        numbers |= _measured(tokens, self._first_probe(tokens))
        if scores:
            numbers["patch_consistency"] = float(torch.cat(scores).mean())
        return {f"{PREFIX}{name}": numbers[name] for name in MEANINGS if name in numbers}

    def _seen(self, see: Callable[[Tensor], ProbeOutput], view: Tensor, start: int) -> ProbeOutput:
        with self.machine.autocast():
            return see(view[start : start + _CHUNK].to(self.machine.device, self.machine.weight_dtype))

    def _first_probe(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._first is None and self.reference.is_file():
            self._first = _read_first_probe(self.reference, tokens)
        if self._first is None:
            self._first = {name: value.half() if name == "patch_tokens" else value for name, value in tokens.items()}
            if is_main():
                with atomic_write(self.reference) as stream:
                    stream.write(save(self._first))
        return self._first


PREFIX = "features/"
MEANINGS = {
    "cls_entropy": "entropy of the soft assignment of CLS tokens / ln K: 1 = undecided, 0 = one choice each",
    "cls_information": "nats that an assignment tells of its slice, CLS tokens: 0 = all slices get the same",
    "cls_assignments_used": "share of choices that are some slice's first, of as many as there could be",
    "patch_entropy": "as cls_entropy, patch tokens",
    "patch_information": "as cls_information, patch tokens",
    "patch_assignments_used": "as cls_assignments_used, patch tokens",
    "cls_rankme": "effective rank of the CLS tokens (RankMe); 1 = collapsed, at most the number of slices",
    "patch_rankme": "effective rank of the patch tokens (RankMe); 1 = collapsed, at most the dimension",
    "nearest_distance": "mean distance of a normalised CLS token to its nearest (what KoLeo spreads); 0 = collapsed",
    "patch_consistency": "how surely a patch is found again in another view; 0.5 = chance, 1 = perfect",
    "cls_drift": "root mean square change of cosine similarities between slices since the first probe",
    "patch_drift": "root mean square change of cosine similarities between a slice's patches since the first probe",
    "neighbours_kept": "share of each slice's 3 nearest slices that were among them at the first probe",
}


class AssignmentUse:
    """Adds up how soft assignments spread over their choices, without keeping them."""

    def __init__(self) -> None:
        self._rows, self._entropy = 0, 0.0
        self._sum: Tensor | None = None
        self._first_choices: set[int] = set()

    def add(self, logits: Float[Tensor, "m k"]) -> None:
        """Take in the logits of some tokens, divided by their temperature."""
        log_probabilities = F.log_softmax(logits.float(), dim=-1)
        probabilities = log_probabilities.exp()
        self._rows += len(logits)
        self._entropy -= float((probabilities * log_probabilities).sum())
        total = probabilities.sum(0).double()
        self._sum = total if self._sum is None else self._sum + total
        self._first_choices.update(logits.argmax(-1).tolist())

    def numbers(self) -> dict[str, float]:
        """Return entropy / ln K, information in nats, and the share of choices in use."""
        if self._sum is None:
            raise ValueError("no logits were added")
        mean = self._sum / self._rows
        entropy = self._entropy / self._rows
        return {
            "entropy": entropy / math.log(len(mean)),
            "information": float(-torch.xlogy(mean, mean).sum()) - entropy,
            "assignments_used": len(self._first_choices) / min(len(mean), self._rows),
        }


def rankme(features: Float[Tensor, "n d"]) -> float:
    """Return the effective rank of features: exp of the entropy of their normalised singular values.

    Source: Garrido et al. 2023, equation 1 (features as they are, not centred; epsilon 1e-7).
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def nearest_distance(features: Float[Tensor, "n d"]) -> float:
    """Return the mean distance from each normalised feature to its nearest: what KoLeo takes the logarithm of."""
    unit = F.normalize(features.double(), dim=-1)
    # As differences: a distance from a dot product has no correct digit left where features collapse.
    distances = (unit[:, None] - unit[None]).norm(dim=-1)
    distances.fill_diagonal_(math.inf)
    return float(distances.min(dim=1).values.mean())


def similarity_drift(now: Float[Tensor, "b n d"], first: Float[Tensor, "b n d"]) -> float:
    """Return the root mean square difference of cosine-similarity matrices, one matrix a row of the batch."""
    squares = []
    for a, b in zip(now, first, strict=True):
        one, other = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
        squares.append((one @ one.T - other @ other.T).square().mean())
    return float(torch.stack(squares).mean().sqrt())


def neighbours_kept(now: Float[Tensor, "n d"], first: Float[Tensor, "n d"]) -> float:
    """Return which share of each feature's nearest others (cosine) were nearest at first."""
    count = min(_NEIGHBOURS, len(now) - 1)
    if count < 1:
        return 1.0
    nearest = []
    for features in (now, first):
        unit = F.normalize(features.double(), dim=-1)
        similarity = (unit @ unit.T).fill_diagonal_(-math.inf)
        nearest.append(similarity.topk(count, dim=1).indices.tolist())
    kept = [len(set(a) & set(b)) / count for a, b in zip(*nearest, strict=True)]
    return sum(kept) / len(kept)


def _thinned(rows: Tensor, count: int) -> Tensor:
    return rows[:: max(1, len(rows) // count)][:count]


def _measured(now: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, float]:
    cls_tokens = now["cls_tokens"]
    numbers = {
        "cls_rankme": rankme(cls_tokens),
        "nearest_distance": nearest_distance(cls_tokens),
        "cls_drift": similarity_drift(cls_tokens[None], first["cls_tokens"][None]),
        "neighbours_kept": neighbours_kept(cls_tokens, first["cls_tokens"]),
    }
    if "patch_tokens" in now:
        patches = now["patch_tokens"]
        numbers["patch_rankme"] = rankme(_thinned(patches.flatten(0, 1), _PATCHES_FOR_RANK))
        numbers["patch_drift"] = similarity_drift(patches, first["patch_tokens"].float())
    return numbers


def _read_first_probe(path: Path, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        first = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} (features of this run's first probe) is damaged: {error}; delete it") from error
    shapes, wanted = ({name: list(value.shape) for name, value in each.items()} for each in (first, tokens))
    if shapes != wanted:
        raise CheckpointError(
            f"{path} holds features {shapes}, the run now gives {wanted}; of other slices or another model: delete it"
        )
    return first


def patch_consistency(
    first: Float[Tensor, "n d h w"], second_mirrored: Float[Tensor, "n d h w"], body: Bool[Tensor, "n y x"] | None = None
) -> Float[Tensor, " n"]:
    """Score how surely a patch is found again in another view of its slice.

    For each patch of the first view: the share of the second view's other patches that are less similar to it (cosine)
    than its own counterpart; ties count half. 1 is perfect, 0.5 is chance, and chance is what features give that
    collapsed, drown in noise, or know only where a patch lies (the second view is mirrored).

    Args:
        first: Patch map of the first view.
        second_mirrored: Patch map of the mirrored second view; turned back here.
        body: Where the first view shows the body, at any resolution. Only patches that are at least half body count, for
            air cannot be told from air; None, or a slice without two such patches: all count.

    Returns:
        One score a slice, the mean over its patches.
    """
    # Contiguous: sums over channels must not depend on how the backbone laid its tokens out.
    one = F.normalize(first.float().contiguous().flatten(2).transpose(1, 2), dim=-1)
    other = F.normalize(second_mirrored.float().flip(-1).contiguous().flatten(2).transpose(1, 2), dim=-1)
    kept = torch.ones(one.shape[:2], dtype=torch.bool, device=one.device)
    if body is not None:
        kept = F.adaptive_avg_pool2d(body.float(), (first.shape[-2], first.shape[-1])).flatten(1).to(one.device) >= 0.5
        kept[kept.sum(1) < 2] = True
    scores = []
    for a, b, chosen in zip(one, other, kept, strict=True):  # a slice at a time: patches x patches is the largest thing here
        similarity = a[chosen] @ b[chosen].T
        own = similarity.diagonal().unsqueeze(1)
        # Rounding must not decide between patches that are equal: a collapsed model would win or lose by luck.
        below = (similarity < own - 1e-6).float() + 0.5 * ((similarity - own).abs() <= 1e-6).float()
        others = len(similarity) - 1
        scores.append(((below.sum(1) - 0.5) / others).mean() if others else own.new_tensor(0.5))
    return torch.stack(scores)


@torch.no_grad()
def snapshot_scores(backbone: Backbone, fixed: FixedSlices, machine: Machine) -> Float[Tensor, " n"]:
    """Score a backbone's patch tokens on fixed slices; see `patch_consistency`.

    Args:
        backbone: In evaluation mode.
        fixed: The slices.
        machine: Where the backbone is.
    """
    scores = []
    for start in range(0, len(fixed), _CHUNK):
        maps = []
        for view in (fixed.first_view, fixed.second_view):
            with machine.autocast():
                output = backbone.tokens(view[start : start + _CHUNK].to(machine.device, machine.weight_dtype))
            maps.append(output.patch_map)
        scores.append(patch_consistency(maps[0], maps[1], fixed.body[start : start + _CHUNK]).cpu())
    return torch.cat(scores)
