"""How a run is doing, from the teacher's features of fixed slices alone: no labels."""

import math
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from meddino.core.device import Machine
from meddino.core.errors import CheckpointError
from meddino.core.files import atomic_write
from meddino.distributed.collectives import is_main
from meddino.models.backbone import BackboneOutput
from meddino_pretrain.monitoring.config import HealthConfig
from meddino_pretrain.monitoring.fixed_slices import FixedSlices
from meddino_pretrain.monitoring.patch_quality import CHUNK, patch_consistency, patch_map

_EVERY_PATCH = 8  # goes through the head: the logits of all patches at 65,536 prototypes would be gigabytes
_PATCHES_FOR_RANK = 2048
_NEIGHBOURS = 3


@runtime_checkable
class Looks(Protocol):
    """A backbone with heads that can be looked at; the teacher of an objective."""

    def look(
        self, images: Float[Tensor, "n c h w"], every: int
    ) -> tuple[BackboneOutput, Float[Tensor, "n k"], Float[Tensor, "m k2"]]:
        """Return what the backbone sees, the logits of the CLS tokens, and those of every so many-th patch of each image."""
        ...


class HealthProbe:
    """Measures a teacher on fixed slices, and against how it was when it was first measured."""

    def __init__(self, fixed: FixedSlices, config: HealthConfig, machine: Machine, reference: Path) -> None:
        """Keep what is needed for a look.

        Args:
            fixed: The slices.
            config: How often.
            machine: Where the teacher is.
            reference: File of the first look's features: written by the first process at the first look, read later, so
                that a resumed run goes on comparing with the same features.
        """
        self.fixed, self.config, self.machine, self.reference = fixed, config, machine, reference
        self._first: dict[str, Tensor] | None = None

    def due(self, step: int) -> bool:
        """Tell whether the teacher shall be looked at after this step."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    @torch.no_grad()
    def measure(self, teacher: Looks, teacher_temperature: float) -> dict[str, float]:
        """Look at the teacher. Every process must call it; the numbers are the same in all.

        Args:
            teacher: In evaluation mode.
            teacher_temperature: Of the softmax over prototypes.

        Returns:
            Numbers whose names begin with "health/"; `MEANINGS` says what each means.

        Raises:
            CheckpointError: The file of the first look is damaged or belongs to other slices or another model.
        """
        cls_use, patch_use = PrototypeUse(teacher_temperature), PrototypeUse(teacher_temperature)
        cls_parts, patch_parts, scores = [], [], []
        for start in range(0, len(self.fixed), CHUNK):
            images = self.fixed.first_view[start : start + CHUNK].to(self.machine.device, self.machine.weight_dtype)
            mirrored = self.fixed.second_view[start : start + CHUNK].to(self.machine.device, self.machine.weight_dtype)
            with self.machine.autocast():
                output, cls_logits, patch_logits = teacher.look(images, _EVERY_PATCH)
                other, *_ = teacher.look(mirrored, _EVERY_PATCH)
            cls_use.add(cls_logits)
            patch_use.add(patch_logits)
            body = self.fixed.body[start : start + CHUNK]
            scores.append(patch_consistency(patch_map(output), patch_map(other), body).cpu())
            cls_parts.append(output.cls_token.float().cpu())
            patch_parts.append(output.patch_tokens.float().cpu())
        cls_tokens, patch_tokens = torch.cat(cls_parts), torch.cat(patch_parts)
        first = self._first_look(cls_tokens, patch_tokens)
        numbers = {
            **{f"cls_{name}": value for name, value in cls_use.numbers().items()},
            **{f"patch_{name}": value for name, value in patch_use.numbers().items()},
            "cls_rankme": rankme(cls_tokens),
            "patch_rankme": rankme(_thinned(patch_tokens.flatten(0, 1), _PATCHES_FOR_RANK)),
            "nearest_distance": nearest_distance(cls_tokens),
            "patch_consistency": float(torch.cat(scores).mean()),
            "cls_drift": similarity_drift(cls_tokens[None], first["cls_tokens"][None]),
            "patch_drift": similarity_drift(patch_tokens, first["patch_tokens"].float()),
            "neighbours_kept": neighbours_kept(cls_tokens, first["cls_tokens"]),
        }
        return {f"health/{name}": value for name, value in numbers.items()}

    def _first_look(self, cls_tokens: Tensor, patch_tokens: Tensor) -> dict[str, Tensor]:
        if self._first is None and self.reference.is_file():
            self._first = _read_first_look(self.reference, cls_tokens, patch_tokens)
        if self._first is None:
            self._first = {"cls_tokens": cls_tokens, "patch_tokens": patch_tokens.half()}
            if is_main():
                with atomic_write(self.reference) as stream:
                    stream.write(save(self._first))
        return self._first


MEANINGS = {
    "cls_entropy": "entropy of the teacher's softmax over prototypes / ln K, CLS head: 1 = undecided, 0 = one prototype each",
    "cls_information": "nats that a prototype tells of its slice, CLS head: 0 = all slices get the same assignment",
    "cls_prototypes_used": "share of prototypes that are some slice's first choice, of as many as there could be",
    "patch_entropy": "as cls_entropy, masked-patch head",
    "patch_information": "as cls_information, masked-patch head",
    "patch_prototypes_used": "as cls_prototypes_used, masked-patch head",
    "cls_rankme": "effective rank of the CLS tokens (RankMe); 1 = collapsed, at most the number of slices",
    "patch_rankme": "effective rank of the patch tokens (RankMe); 1 = collapsed, at most the dimension",
    "nearest_distance": "mean distance of a normalised CLS token to its nearest (what KoLeo spreads); 0 = collapsed",
    "patch_consistency": "how surely a patch is found again in another view; 0.5 = chance, 1 = perfect",
    "cls_drift": "root mean square change of cosine similarities between slices since the first look",
    "patch_drift": "root mean square change of cosine similarities between a slice's patches since the first look",
    "neighbours_kept": "share of each slice's 3 nearest slices that were among them at the first look",
}


class PrototypeUse:
    """Adds up how logits spread over prototypes, without keeping them."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._rows, self._entropy = 0, 0.0
        self._sum: Tensor | None = None
        self._first_choices: set[int] = set()

    def add(self, logits: Float[Tensor, "m k"]) -> None:
        """Take in the logits of some tokens."""
        log_probabilities = F.log_softmax(logits.float() / self.temperature, dim=-1)
        probabilities = log_probabilities.exp()
        self._rows += len(logits)
        self._entropy -= float((probabilities * log_probabilities).sum())
        total = probabilities.sum(0).double()
        self._sum = total if self._sum is None else self._sum + total
        self._first_choices.update(logits.argmax(-1).tolist())

    def numbers(self) -> dict[str, float]:
        """Return entropy / ln K, information in nats, and the share of prototypes in use."""
        if self._sum is None:
            raise ValueError("no logits were added")
        mean = self._sum / self._rows
        entropy = self._entropy / self._rows
        return {
            "entropy": entropy / math.log(len(mean)),
            "information": float(-torch.xlogy(mean, mean).sum()) - entropy,
            "prototypes_used": len(self._first_choices) / min(len(mean), self._rows),
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


def _read_first_look(path: Path, cls_tokens: Tensor, patch_tokens: Tensor) -> dict[str, Tensor]:
    try:
        first = load_file(path)
        shapes = [first["cls_tokens"].shape, first["patch_tokens"].shape]
    except (SafetensorError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} (features of the first look at this run) is damaged: {error}; delete it") from error
    if shapes != [cls_tokens.shape, patch_tokens.shape]:
        raise CheckpointError(
            f"{path} holds features {[list(shape) for shape in shapes]}, the run now gives "
            f"{[list(cls_tokens.shape), list(patch_tokens.shape)]}; it belongs to other slices or another model: delete it"
        )
    return first
