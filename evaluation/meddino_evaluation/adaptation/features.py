"""Features of frozen backbones: streamed, one vector a slice, cached by (model, content, transform)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from meddino.core.device import Machine
from meddino.core.errors import MedDINOError, VolumeError
from meddino.core.files import atomic_write, canonical_json
from meddino.core.logging import get_logger
from meddino.data.content import slice_hash, volume_hash
from meddino.data.intensity import Modality
from meddino_evaluation.adaptation.config import FeaturesConfig
from meddino_evaluation.backbones.adapter import Backbone
from meddino_evaluation.classification.dataset_config import DatasetConfig
from meddino_evaluation.classification.images import ReadingNotes, SliceStack, read_slices
from meddino_evaluation.data.case import ClassCase
from meddino_evaluation.data.prepare import stored_slice

_log = get_logger(__name__)
_CASES_A_PART = 64


@dataclass(frozen=True)
class Transform:
    """How a stored image becomes a backbone's input; part of the cache's key.

    Attributes:
        size_px: Side of the square input.
        modality: Of the data set.
        window_hu: HU window, or None for the model's own.
        max_slices: Evenly spaced slices of a volume, or None for all.
        last_blocks: CLS vectors kept.
        volume: A case may hold several slices.
    """

    size_px: int
    modality: Modality
    window_hu: tuple[float, float] | None
    max_slices: int | None
    last_blocks: int
    volume: bool = True

    def slice_numbers(self, count: int) -> list[int]:
        """Return which slices of a volume are looked at."""
        if self.max_slices is None or count <= self.max_slices:
            return list(range(count))
        return [int((number + 0.5) * count / self.max_slices) for number in range(self.max_slices)]

    def hash(self) -> str:
        """Return a SHA-256 of the settings."""
        return hashlib.sha256(canonical_json(self.__dict__).encode()).hexdigest()


def make_transform(backbone: Backbone, config: FeaturesConfig, data: DatasetConfig) -> Transform:
    """Return the transform of a backbone on a data set.

    Raises:
        ConfigError: The size does not fit the model.
    """
    size = config.image_size_px or backbone.contract.native_size_px
    backbone.contract.check_size(size, backbone.name)
    mismatch = backbone.contract.mismatch(data.modality, f"model {backbone.name} on {data.name}")
    if mismatch:
        _log.warning("%s; they are scaled to its range", mismatch)
    return Transform(size, data.modality, data.window_hu, config.max_slices, config.last_blocks, data.volume)


def read_case(case: ClassCase, transform: Transform) -> SliceStack:
    """Read a case's slices.

    Raises:
        VolumeError: As `read_slices`; or several slices in a data set of single images.
    """
    stack = read_slices(case.source, transform.modality)
    if len(stack.values) > 1 and not transform.volume:
        raise VolumeError(
            f"image {case.source} holds {len(stack.values)} slices, and its data set says one image a case; "
            "set volume: true in the data set's definition"
        )
    return stack


def model_input(backbone: Backbone, stack: SliceStack, numbers: Sequence[int], transform: Transform) -> Tensor:
    """Return some slices of a case as model input [n, C, size, size]: resized (bilinear, antialiased), then normalised."""
    parts = [stack.tensor(number, number + 1) for number in numbers]
    values = torch.cat(parts)
    if stack.kind == "hu":
        # Clipped first: resizing must not smear a metal implant's 3000 HU over its neighbours.
        low, high = transform.window_hu or backbone.contract.ct_window
        values = values.mean(1, keepdim=True).clamp(low, high)
    size = (transform.size_px, transform.size_px)
    if values.shape[-2:] != size:
        values = functional.interpolate(values, size=size, mode="bilinear", align_corners=False, antialias=True)
    if stack.kind == "hu":
        return backbone.contract.from_ct(values, transform.window_hu)
    return backbone.contract.from_unit(values)


def slice_hashes(stack: SliceStack) -> tuple[str, ...]:
    """Return a hash of each slice's stored values; the same for a picture saved in another lossless format."""
    values = np.rint(stack.values).astype(np.int16) if stack.kind == "hu" else stack.values
    found = []
    for one in values:
        digest = hashlib.sha256(f"{stack.kind} {one.shape[-2]} {one.shape[-1]}".encode())
        digest.update(np.ascontiguousarray(one).tobytes())
        found.append(digest.hexdigest())
    return tuple(found)


def _key(stack: SliceStack) -> str:
    """Return a hash of all that a case's features depend on: its values to the last bit, and what they mean."""
    values = np.ascontiguousarray(stack.values)
    digest = hashlib.sha256(f"{stack.kind} {stack.low} {stack.high} {values.dtype.str} {values.shape}".encode())
    digest.update(values.tobytes())
    return digest.hexdigest()


def corpus_hashes(stack: SliceStack) -> tuple[str, ...]:
    """Return content hashes as the manifests of a corpus have them: of all slices together, and of each."""
    modality: Modality = "ct" if stack.kind == "hu" else "image"
    stored = [stored_slice(values, modality, colour=stack.values.shape[1] == 3) for values in stack.values]
    return (volume_hash(stored, len(stored)), *map(slice_hash, stored))


@dataclass(frozen=True)
class FeatureTable:
    """Features of some cases.

    Attributes:
        ids: Of the cases.
        rows: For each case, float32 [slices, width]: CLS vectors of the last blocks side by side (the last one last), then
            the mean patch token.
        widths: Width of each block's vector; the rest of a row is the mean patch token.
    """

    ids: tuple[str, ...]
    rows: tuple[Tensor, ...]
    widths: tuple[int, ...]

    def bags(self, last_blocks: int = 1, average_pool: bool = False) -> list[Tensor]:
        """Return one [slices, D] a case: CLS of the last blocks (as many as there are) and, if wanted, the mean patch token."""
        start = sum(self.widths[: max(0, len(self.widths) - last_blocks)])
        stop = None if average_pool else sum(self.widths)
        return [row[:, start:stop] for row in self.rows]

    def vectors(self, last_blocks: int = 1, average_pool: bool = False, pooling: str = "mean") -> Tensor:
        """Return [n, D]: slices pooled over each volume's real slices."""
        bags = self.bags(last_blocks, average_pool)
        return torch.stack([bag.mean(0) if pooling == "mean" else bag.max(0).values for bag in bags])

    def subset(self, chosen: Sequence[int]) -> "FeatureTable":
        """Return the cases at some places."""
        return FeatureTable(
            tuple(self.ids[place] for place in chosen),
            tuple(self.rows[place] for place in chosen),
            self.widths,
        )


def joined(first: FeatureTable, second: FeatureTable) -> FeatureTable:
    """Return both tables' cases, one after the other."""
    return FeatureTable(first.ids + second.ids, first.rows + second.rows, first.widths)


class FeatureExtractor:
    """Computes features, or takes them from the cache.

    Args:
        backbone: Frozen; its hash is taken here and compared again by `check_frozen`.
        transform: How images become input.
        config: Batch size and the like.
        cache: Folder of the cache.
        machine: Where to compute.

    Attributes:
        slice_hashes: Of each case that was read, the content hash of every slice.
        content_hashes: Of each case that was read, the content hash of its voxels and of each slice, as in a corpus's
            manifests.
        notes: What was assumed or left out when cases were read.
    """

    def __init__(self, backbone: Backbone, transform: Transform, config: FeaturesConfig, cache: Path, machine: Machine) -> None:
        self.backbone = backbone.eval().requires_grad_(False).to(machine.device)
        self.transform = transform
        self.batch_size = config.batch_size
        self.machine = machine
        self.model_hash = backbone.hash()
        # Equal weights under another input contract, or in another architecture, see and compute something else.
        seen = f"{transform.hash()} {backbone.contract!r} {getattr(backbone.network, 'config', '')!r}"
        self.store = FeatureStore(cache / f"{self.model_hash[:20]}-{hashlib.sha256(seen.encode()).hexdigest()[:20]}")
        self.widths: tuple[int, ...] | None = None
        self.computed = 0
        self.slice_hashes: dict[str, tuple[str, ...]] = {}
        self.content_hashes: dict[str, tuple[str, ...]] = {}
        self.notes = ReadingNotes()

    def __call__(self, cases: Sequence[ClassCase]) -> FeatureTable:
        """Return the features of some cases.

        Raises:
            VolumeError: An image cannot be used; names it.
            MedDINOError: Features are not finite; names the cases.
        """
        keys: list[str] = []
        done: dict[str, Tensor] = {}
        fresh: dict[str, Tensor] = {}
        waiting: list[_Waiting] = []
        for case in cases:
            stack = read_case(case, self.transform)
            self.notes.add(case.name, stack)
            self.slice_hashes[case.name] = slice_hashes(stack)
            self.content_hashes[case.name] = corpus_hashes(stack)
            key = _key(stack)
            keys.append(key)
            if key in done or any(one.key == key for one in waiting):
                continue
            cached = self.store.get(key)
            if cached is not None:
                done[key] = cached
                continue
            numbers = self.transform.slice_numbers(len(stack.values))
            if len(numbers) > self.batch_size:
                fresh[key] = done[key] = self._checked(self._compute(stack, numbers), case.name)
            else:
                waiting.append(_Waiting(key, case.name, model_input(self.backbone, stack, numbers, self.transform)))
            if sum(len(one.images) for one in waiting) >= self.batch_size:
                fresh |= self._flush(waiting, done)
            if len(fresh) >= _CASES_A_PART:
                self.store.add(fresh, self._widths())
                fresh = {}
        fresh |= self._flush(waiting, done)
        self.store.add(fresh, self._widths())
        return FeatureTable(tuple(case.name for case in cases), tuple(done[key] for key in keys), self._widths())

    def check_frozen(self) -> None:
        """Refuse to report anything if a parameter or buffer of the frozen backbone has changed."""
        if self.backbone.hash() != self.model_hash:
            raise RuntimeError(f"the frozen backbone {self.backbone.name} changed while features were computed")

    def _widths(self) -> tuple[int, ...]:
        if self.widths is None:
            self.widths = self.store.widths
        assert self.widths is not None
        return self.widths

    def _flush(self, waiting: list["_Waiting"], done: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute what waits, cases of few slices together; empties the list."""
        if not waiting:
            return {}
        rows = self._tokens(torch.cat([one.images for one in waiting]))
        parts = torch.split(rows, [len(one.images) for one in waiting])
        made = {one.key: self._checked(part.clone(), one.case) for one, part in zip(waiting, parts, strict=True)}
        waiting.clear()
        done |= made
        return made

    def _compute(self, stack: SliceStack, numbers: Sequence[int]) -> Tensor:
        chunks = [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]
        return torch.cat([self._tokens(model_input(self.backbone, stack, chunk, self.transform)) for chunk in chunks])

    @torch.no_grad()
    def _tokens(self, images: Tensor) -> Tensor:
        rows = []
        for batch in torch.split(images, self.batch_size):
            with self.machine.autocast():
                tokens = self.backbone.tokens(batch.to(self.machine.device), self.transform.last_blocks)
            self.widths = tuple(int(block.shape[1]) for block in tokens.blocks)
            rows.append(torch.cat([*tokens.blocks, tokens.patches.mean((2, 3))], dim=1).float().cpu())
            self.computed += len(batch)
        return torch.cat(rows)

    def _checked(self, row: Tensor, case: str) -> Tensor:
        if not torch.isfinite(row).all():
            raise MedDINOError(
                f"model {self.backbone.name}: features of case {case} are not finite (NaN or infinity); the weights are "
                "damaged or the input is outside what the model can take"
            )
        return row


@dataclass(frozen=True)
class _Waiting:
    key: str
    case: str
    images: Tensor


class FeatureStore:
    """A folder of safetensors files, each with the features of some images under their content hash.

    An interrupted extraction keeps what it had written; a damaged file is computed anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.widths: tuple[int, ...] | None = None
        self._where: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
            try:
                with safe_open(path, framework="pt") as file:
                    self.widths = tuple(json.loads(file.metadata()["widths"]))
                    self._where |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError):
                _log.warning("feature cache: %s is damaged and is computed anew", path)
                path.unlink(missing_ok=True)

    def get(self, key: str) -> Tensor | None:
        """Return the features of an image, or None."""
        path = self._where.get(key)
        if path is None:
            return None
        with safe_open(path, framework="pt") as file:
            features: Tensor = file.get_tensor(key)
            return features

    def add(self, features: dict[str, Tensor], widths: tuple[int, ...]) -> None:
        """Write features of some images."""
        if not features:
            return
        name = hashlib.sha256("".join(sorted(features)).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.safetensors"
        content: dict[str, Any] = {key: value.contiguous() for key, value in features.items()}
        with atomic_write(path) as stream:
            stream.write(save(content, metadata={"widths": json.dumps(widths)}))
        self.widths = widths
        self._where |= dict.fromkeys(features, path)
