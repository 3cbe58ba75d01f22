"""Which views of a slice a method learns from: named, counted, sized."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng


@dataclass(frozen=True)
class View:
    """One kind of view.

    Attributes:
        count: Views of this kind of each slice.
        area: Share of the slice's area in a view's box, (lowest, highest) [0-1].
        boxes_of: Kind of view whose boxes, flips and windows it takes, at its own size; None draws its own.
        augmented: False leaves away what chance does to intensities, but for the window.
        trained: Whether the trained network sees it, which costs a backward pass.
        frozen: How many networks without a backward pass see it. Both are for planning alone.
    """

    count: int
    area: tuple[float, float] = (1.0, 1.0)
    boxes_of: str | None = None
    augmented: bool = True
    trained: bool = True
    frozen: int = 0


@dataclass(frozen=True)
class ViewSizes:
    """Side of every kind of view in one step [px], and how often a step takes these sizes, relative to others."""

    px: Mapping[str, int]
    weight: float = 1.0


@dataclass(frozen=True)
class ViewSpec:
    """All views of a stage.

    Attributes:
        views: Name -> kind of view, in the order of a sample's draws. The first is the one by whose size runs are
            compared and which an export's resolutions name.
        sizes: One of them is drawn for each step, for all ranks.
        aspect_ratio: Width / height of a box in millimetres, (lowest, highest).
        flip_probability: Chance of a horizontal flip of each view [0-1].
        with_boxes: Whether batches carry the boxes, in pixels of the slice.
    """

    views: Mapping[str, View]
    sizes: tuple[ViewSizes, ...]
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    with_boxes: bool = False

    @property
    def main(self) -> str:
        """Name of the first view."""
        return next(iter(self.views))

    @property
    def drawn(self) -> dict[str, View]:
        """The views that have boxes of their own."""
        return {name: view for name, view in self.views.items() if view.boxes_of is None}

    @property
    def main_px(self) -> tuple[int, ...]:
        """Sides of the first view that the stage's steps take [px], without repetition."""
        return tuple(dict.fromkeys(sizes.px[self.main] for sizes in self.sizes))

    def rows_of(self, name: str) -> slice:
        """Return where a kind of view stands among the sample's draws."""
        source = self.views[name].boxes_of or name
        start = 0
        for other, view in self.drawn.items():
            if other == source:
                return slice(start, start + view.count)
            start += view.count
        raise KeyError(source)

    def sizes_for_step(self, seed: int, step: int) -> Mapping[str, int]:
        """Return the side of every kind of view in a step [px]: the same on every rank, and whenever it is asked."""
        if len(self.sizes) == 1:
            return self.sizes[0].px
        ends = list(accumulate(sizes.weight for sizes in self.sizes))
        position = numpy_rng(seed, "crop-sizes", step).random() * ends[-1]
        return self.sizes[min(bisect_right(ends, position), len(ends) - 1)].px

    def check_sides(self, multiple_px: int, where: str) -> None:
        """Refuse sizes that a backbone cannot take.

        Args:
            multiple_px: What sides must be multiples of.
            where: The stage, for the message.

        Raises:
            ConfigError: Names each size that is none.
        """
        wrong = [f"{where}: {name}={side}" for sizes in self.sizes for name, side in sizes.px.items() if side % multiple_px]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)} px: not a multiple of the backbone's patch size {multiple_px}")
