"""One compared item, and how a table of them reads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class RecordsError(Exception):
    """The folder holds no records that can be compared."""


@dataclass(frozen=True)
class Item:
    """One compared quantity.

    `difference` is what `measure` says: the largest absolute difference, or a relative one.
    """

    name: str
    difference: float
    tolerance: float
    measure: str = "absolute"
    note: str = ""

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return self.difference <= self.tolerance


def absolute(name: str, found: Tensor, recorded: Tensor, tolerance: float, note: str = "") -> Item:
    """Compare element by element."""
    return Item(name, _largest(found, recorded, torch.ones((), dtype=torch.float64)), tolerance, "absolute", note)


def scaled(name: str, found: Tensor, recorded: Tensor, tolerance: float, note: str = "") -> Item:
    """Compare element by element; where a value is larger than 1 the difference counts relative to it."""
    size = recorded.double().abs().clamp(min=1.0)
    return Item(name, _largest(found, recorded, size), tolerance, "absolute, relative above 1", note)


def relative(name: str, found: Tensor, recorded: Tensor, tolerance: float) -> Item:
    """Compare the norm of the difference with the norm of what is recorded."""
    if found.shape != recorded.shape:
        return _wrong_shape(name, found, recorded, tolerance)
    found, recorded = found.detach().double(), recorded.double()
    norm, difference = recorded.norm(), (found - recorded).norm()
    value = difference / norm if norm > 0 else difference
    return Item(name, float(value), tolerance, "relative")


def as_table(items: Sequence[Item]) -> str:
    """Return one line an item."""
    width = max(len(item.name) for item in items)
    lines = [f"{'item':<{width}}  {'difference':>10}  {'tolerance':>9}  verdict"]
    for item in items:
        verdict = "ok" if item.passed else "BEYOND"
        note = f"  [{item.note}]" if item.note else ""
        lines.append(
            f"{item.name:<{width}}  {item.difference:>10.2e}  {item.tolerance:>9.0e}  {verdict:<6} {item.measure}{note}"
        )
    beyond = sum(not item.passed for item in items)
    lines.append(f"{len(items)} items, {beyond} beyond their tolerance")
    return "\n".join(lines)


def _largest(found: Tensor, recorded: Tensor, size: Tensor) -> float:
    if found.shape != recorded.shape or not found.numel():
        return math.inf if found.shape != recorded.shape else 0.0
    # max() of torch keeps NaN, so a NaN anywhere is seen.
    return float(((found.detach().double() - recorded.double()).abs() / size).max())


def _wrong_shape(name: str, found: Tensor, recorded: Tensor, tolerance: float) -> Item:
    return Item(name, math.inf, tolerance, "relative", f"shape {list(found.shape)}, recorded {list(recorded.shape)}")
