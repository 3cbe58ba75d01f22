"""Which gaps between a file and a model are allowed, and the report of what was found, tensor by tensor."""

from dataclasses import dataclass, field
from typing import Literal

from meddino.core.config import StrictConfig


class LoadingTolerances(StrictConfig):
    """Where weights may fall short of the model. By default nowhere: every gap is named, or loading fails."""

    sum_input_channels: bool = False
    """3 input channels in the file, 1 in the model: sum the weights."""
    resample_patches: bool = False
    """Another patch size: resample the projection (FlexiViT)."""
    qkv_bias: Literal["as_in_file", "zeros", "drop"] = "as_in_file"
    """zeros: start at zero where the file has none; drop: leave the file's out."""
    registers: Literal["as_in_file", "fresh", "cut"] = "as_in_file"
    """fresh: missing registers keep their fresh weights; cut: take the first ones of the file."""
    missing: tuple[str, ...] = ()
    """Patterns of tensors that may keep fresh weights, e.g. mask_token."""
    unexpected: tuple[str, ...] = ()
    """Patterns of the file's tensors that may be left out."""


@dataclass(frozen=True)
class Coverage:
    """What of a model was found in a file, tensor by tensor.

    Attributes:
        source: File or folder.
        layout: Whose names it has.
        loaded: Tensor -> number of values taken over.
        adapted: Tensor -> what was done to it, as an option asked for.
        fresh: Tensors that keep fresh weights, as an option allowed.
        missing: Tensors that nothing accounts for.
        unexpected: The file's tensors that the model does not have.
        left_out: The same, as an option allowed.
        wrong_shape: Tensor -> "found instead of wanted".
        other_parts: Parts that are no backbone (heads) -> number of tensors.
        notes: Sections opened, prefixes taken off.
    """

    source: str
    layout: str
    loaded: dict[str, int] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    other_parts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """True if every tensor of model and file is accounted for."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def gap(self) -> str:
        """Return what is not accounted for, in one line: how much of each kind, and the first three of them."""
        wrong_shape = [f"{name} {what}" for name, what in self.wrong_shape.items()]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": wrong_shape}
        parts = [
            f"{title} {len(names)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for title, names in kinds.items()
            if names
        ]
        return f"{self.source}: {'; '.join(parts)}"

    def text(self) -> str:
        """Return the report, one line a kind."""
        numbers = sum(self.loaded.values())
        lines = [f"weights from {self.source} ({self.layout} names{''.join(f'; {note}' for note in self.notes)})"]
        lines.append(
            f"  loaded       {len(self.loaded):4d} tensors, {numbers:,} numbers, {numbers * 4 / 2**20:.1f} MiB in float32"
        )
        for title, names in (
            ("adapted", [f"{name}: {what}" for name, what in self.adapted.items()]),
            ("fresh", self.fresh),
            ("left out", self.left_out),
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("wrong shape", [f"{name} {what}" for name, what in self.wrong_shape.items()]),
            ("not backbone", [f"{part} ({count} tensors)" for part, count in self.other_parts.items()]),
        ):
            if names:
                lines.append(f"  {title:12s} {len(names):4d}: {'; '.join(names[:6])}{' ...' if len(names) > 6 else ''}")
        return "\n".join(lines)
