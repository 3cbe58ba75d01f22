"""What the numbers in a label map mean: classes, regions that overlap, and voxels to ignore."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.errors import ConfigError, VolumeError

IGNORED = -1
"""Value of voxels that no loss and no metric counts, in label maps that have been read and checked."""
MAX_LABEL = 65535
"""Largest label value: what a mask picture of 16 bits holds; a larger one is a mistake."""
MAX_BORDER = 0.02
"""Share of a structure that may overlap with another one without a word of the user about which lies on top: a border."""


@dataclass(frozen=True)
class LabelScheme:
    """The labels of a data set, as nnU-Net's dataset.json gives them.

    Attributes:
        names: Name of each target, background left out, in file order.
        values: Label values that make up each target: one value for a class, several for a region.
        ignore: Value whose voxels are not counted, or None.
        region_values: Value written for each target where regions overlap, later ones over earlier ones
            (`regions_class_order`); None for plain classes.
        as_background: Values of labels that are not learned; they count as background.
        is_ordered: Whether the user gave the order of the labels, or structures were found and numbered by name.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    ignore: int | None = None
    region_values: tuple[int, ...] | None = None
    as_background: tuple[int, ...] = ()
    is_ordered: bool = True

    def only(self, names: Sequence[str]) -> "LabelScheme":
        """Return a scheme of some labels; what belongs to none of them counts as background.

        Raises:
            ConfigError: A name is unknown.
        """
        unknown = sorted(set(names) - set(self.names))
        if unknown:
            raise ConfigError(f"labels.use names {unknown}; the data set has {list(self.names)}")
        kept = [place for place, name in enumerate(self.names) if name in names]
        values = tuple(self.values[place] for place in kept)
        order = None if self.region_values is None else tuple(self.region_values[place] for place in kept)
        lost = {value for group in self.values for value in group} - {value for group in values for value in group}
        names, background = tuple(self.names[place] for place in kept), tuple(sorted(lost))
        return replace(self, names=names, values=values, region_values=order, as_background=background)

    @property
    def has_regions(self) -> bool:
        """True if a target is made of several label values, so that targets may overlap."""
        return self.region_values is not None

    @property
    def num_outputs(self) -> int:
        """Channels of a head: one a region, or background and one a class."""
        return len(self.names) if self.has_regions else len(self.names) + 1

    def absent(self, present: Collection[int]) -> list[str]:
        """Return the names of the labels of which no value is among some that occur."""
        return [name for name, group in zip(self.names, self.values, strict=True) if not set(group) & set(present)]

    @property
    def allowed(self) -> frozenset[int]:
        """Every value that a label map may hold."""
        known = {0, *self.as_background, *(value for group in self.values for value in group)}
        return frozenset(known if self.ignore is None else known | {self.ignore})

    def check(self, labels: NDArray[np.int32], where: str) -> NDArray[np.int32]:
        """Refuse values that the scheme does not know and mark ignored voxels with `IGNORED`.

        Raises:
            VolumeError: Names the unknown values and those allowed.
        """
        strange = sorted(set(np.unique(labels).tolist()) - self.allowed)
        if strange:
            raise VolumeError(
                f"{where}: label values {strange[:8]} are not in dataset.json (allowed: {sorted(self.allowed)}); "
                "correct the label map or add them there"
            )
        if self.as_background:
            labels = np.where(np.isin(labels, self.as_background), np.int32(0), labels)
        if self.ignore is None:
            return labels
        return np.where(labels == self.ignore, np.int32(IGNORED), labels)

    def from_structures(
        self, masks: Mapping[str, NDArray[np.bool_]], shape: tuple[int, int, int], where: str
    ) -> tuple[NDArray[np.int32], list[str]]:
        """Turn masks by name into label values; where they overlap the label that is named later lies on top.

        Args:
            masks: [Z, Y, X] each.
            shape: Of the label map.
            where: For messages.

        Returns:
            The label values, and a line for each overlap, or where nothing is there.

        Raises:
            VolumeError: Labels without a given order overlap in more than their borders.
        """
        found = [(name, masks[name], group[0]) for name, group in zip(self.names, self.values, strict=True) if name in masks]
        labels, notes = np.zeros(shape, dtype=np.int32), []
        if not found:
            notes.append(f"none of the labels {', '.join(self.names)} is drawn in it: it counts as background")
        for place, (name, mask, value) in enumerate(found):
            for below, other, _ in found[:place]:
                shared = int((mask & other).sum())
                smaller = min(int(mask.sum()), int(other.sum()))
                if shared > MAX_BORDER * smaller and not self.is_ordered:
                    raise VolumeError(
                        f"{where}: '{below}' and '{name}' overlap in {shared} of {smaller} voxels; write labels.json, in which "
                        "the later label lies on top, or choose with labels.use"
                    )
                notes += [f"'{name}' lies on top of '{below}' in {shared} voxels"] if shared else []
            labels[mask] = value
        return labels, notes

    def mask(self, labels: NDArray[Any], target: int) -> NDArray[np.bool_]:
        """Return where a target is in label values [..., Y, X]."""
        group = self.values[target]
        return np.asarray(labels == group[0] if len(group) == 1 else np.isin(labels, group), dtype=np.bool_)

    def class_indices(self, labels: NDArray[np.int32]) -> NDArray[np.int32]:
        """Turn label values into head channels 0 (background), 1, 2, ...; ignored voxels stay `IGNORED`. Classes only."""
        if all(group == (index + 1,) for index, group in enumerate(self.values)):
            return labels
        table = {0: 0, IGNORED: IGNORED} | {group[0]: index + 1 for index, group in enumerate(self.values)}
        known = np.array(sorted(table), dtype=np.int32)
        # Every step of training comes through here, and looking values up is twice as fast as sorting them.
        places = np.minimum(np.searchsorted(known, labels), len(known) - 1)
        if not np.array_equal(known[places], labels):
            raise ValueError(f"label values {sorted(set(np.unique(labels).tolist()) - set(table))} are not of this scheme")
        return np.array([table[int(value)] for value in known], dtype=np.int32)[places]

    def label_values(self, channels: NDArray[Any]) -> NDArray[np.int32]:
        """Turn what a head predicts into label values.

        Args:
            channels: Class numbers [...] for plain classes; booleans [regions, ...] for regions.
        """
        if self.region_values is None:
            table = np.array([0, *(group[0] for group in self.values)], dtype=np.int32)
            return np.asarray(table[channels], dtype=np.int32)
        out = np.zeros(channels.shape[1:], dtype=np.int32)
        for mask, value in zip(channels, self.region_values, strict=True):
            out[mask] = value
        return out


def parse_labels(entry: Any, order: Any, where: str) -> LabelScheme:
    """Read "labels" and "regions_class_order" of an nnU-Net dataset.json.

    Raises:
        ConfigError: It is no mapping of names to whole numbers (or lists of them), two names have the same values, or a region
            order is missing or does not fit.
    """
    if not isinstance(entry, Mapping) or "background" not in entry:
        raise ConfigError(f"{where}: 'labels' must map names to values and contain \"background\": 0")
    groups: dict[str, tuple[int, ...]] = {}
    for name, value in entry.items():
        values = value if isinstance(value, list) else [value]
        if not values or not all(_is_label(item) for item in values):
            raise ConfigError(
                f"{where}: label '{name}' is {value!r}; expected a whole number >= 0 (at most {MAX_LABEL}) or a list of them"
            )
        groups[str(name)] = tuple(values)
    if groups.pop("background") != (0,):
        raise ConfigError(f'{where}: "background" must be 0')
    ignore = groups.pop("ignore", None)
    if not groups:
        raise ConfigError(f"{where}: no label besides background")
    _check_apart(groups, ignore, where)
    names, values_of = tuple(groups), tuple(groups.values())
    if all(len(group) == 1 for group in values_of):
        region_values = None
    elif isinstance(order, list) and len(order) == len(names) and all(_is_label(item) for item in order):
        region_values = tuple(order)
        for name, group, written in zip(names, values_of, region_values, strict=True):
            if written not in group or region_values.count(written) > 1:
                raise ConfigError(
                    f"{where}: 'regions_class_order' is {order}: '{name}' would be written as {written}; expected a number of "
                    f"its own among its values {list(group)}"
                )
    else:
        raise ConfigError(
            f"{where}: labels with several values need 'regions_class_order', one number for each of {list(names)}"
        )
    return LabelScheme(names, values_of, None if ignore is None else ignore[0], region_values)


def _is_label(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LABEL


def _check_apart(groups: Mapping[str, Sequence[int]], ignore: Sequence[int] | None, where: str) -> None:
    """Refuse values that would mean two things: of two labels, of a label and background, of a label and what is ignored."""
    meaning: dict[frozenset[int], str] = {frozenset((0,)): "background"}
    for name, values in groups.items():
        other = meaning.setdefault(frozenset(values), name)
        if other != name:
            raise ConfigError(f"{where}: '{other}' and '{name}' are both {sorted(set(values))}; a value has one name")
        if 0 in values:
            raise ConfigError(f"{where}: label '{name}' holds 0, which is background")
    if ignore is None:
        return
    if len(ignore) != 1 or ignore[0] == 0:
        raise ConfigError(f'{where}: "ignore" is {list(ignore)}; expected one whole number above 0')
    shared = [name for name, values in groups.items() if ignore[0] in values]
    if shared:
        raise ConfigError(f"{where}: '{shared[0]}' holds {ignore[0]}, which is \"ignore\"; a value has one name")
