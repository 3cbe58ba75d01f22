"""What every method's part of a recipe has in common. Imports no torch: `show`, reports and submission read it too."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from meddino.core.config import StrictConfig
from meddino_pretrain.methods import METHODS

Action = Literal["run", "light", "skip"]
Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class KeptBackbone:
    """A backbone that an earlier stage is to keep for this one.

    Attributes:
        stage: The earlier stage.
        step: After which of its steps; None leaves the choice among all that it keeps to a measurement.
        slices: Fixed slices that they are measured on.
    """

    stage: str
    step: int | None
    slices: int = 32


@dataclass(frozen=True)
class Chart:
    """A chart of a report.

    Attributes:
        title: Of the chart.
        unit: Label of the y axis.
        series: Names of recorded numbers -> what the legend calls them.
        levels: Horizontal lines: label -> value.
    """

    title: str
    unit: str
    series: Mapping[str, str]
    levels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Terms:
    """What a method records, for tables, curves and findings.

    Attributes:
        losses: Names of the loss terms, the most telling first.
        charts: Of other numbers that it records.
        chance: Loss term -> its value while nothing is learnt.
        uniform: Recorded entropy of a head's targets -> its value where all outputs are equally likely.
        advice: What else to look at where features collapse, as the end of a sentence.
    """

    losses: tuple[str, ...]
    charts: tuple[Chart, ...] = ()
    chance: Mapping[str, float] = field(default_factory=dict)
    uniform: Mapping[str, float] = field(default_factory=dict)
    advice: str = "the weights of the terms"


class MethodConfig(StrictConfig):
    """Base of what a stage says about its method. Subclasses have `name: Literal[...]`, the method's row in METHODS.

    As the type of a field it takes any of them, told by `name`.
    """

    model_config = ConfigDict(defer_build=True)  # the methods' own modules import this one

    @classmethod
    def members(cls) -> tuple[type[StrictConfig], ...]:
        """See `StrictConfig`."""
        return tuple(row.config_class() for row in METHODS.values()) if cls is MethodConfig else (cls,)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return a union over METHODS as it is when the recipe's schema is built."""
        if cls is not MethodConfig:
            return handler(source)
        choices = {name: handler.generate_schema(row.config_class()) for name, row in METHODS.items()}
        return core_schema.tagged_union_schema(choices, discriminator="name")

    @property
    def terms(self) -> Terms:
        """What the method records."""
        raise NotImplementedError

    @property
    def kept_backbone(self) -> KeptBackbone | None:
        """The earlier stage's backbone that the method needs beside its own; None if it needs none."""
        return None

    def after_choice(self, action: Action) -> "MethodConfig | None":
        """Return the config that a stage runs with after `Method.choose_kept` has decided; None leaves the stage out."""
        return None if action == "skip" else self


def check_ascending(ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse a range that does not go up, or begins at 0 or below.

    Raises:
        ValueError: Names it; pydantic adds where it stands.
    """
    for name, (low, high) in ranges.items():
        if not 0 < low <= high:
            raise ValueError(f"{name} {[low, high]} must ascend and be above 0")


class MultiCropConfig(StrictConfig):
    """Large and small crops of a slice."""

    large_px: int = Field(224, gt=0)
    """Side of the large crops [px]; VICRegL, LVM-Med: 224."""
    small_px: int = Field(96, gt=0)
    """Side of the small crops [px]; VICRegL, LVM-Med: 96."""
    num_large: int = Field(2, ge=2)
    """Large crops of each slice; VICRegL: 2."""
    num_small: int = Field(2, ge=0)
    """Small crops of each slice; LVM-Med: 2, VICRegL: 6."""
    large_scale: tuple[Fraction, Fraction] = (0.4, 1.0)
    """Share of the slice's area in a large crop [0-1]; VICRegL: 0.4-1."""
    small_scale: tuple[Fraction, Fraction] = (0.08, 0.4)
    """Share of the slice's area in a small crop [0-1]; VICRegL: 0.08-0.4."""
    aspect_ratio: tuple[float, float] = (0.75, 1.333333333)
    """Width / height of a crop's box, in millimetres; torchvision: 3/4-4/3."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Chance of a horizontal flip of each crop [0-1]; all: 0.5."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "MultiCropConfig":
        check_ascending({name: getattr(self, name) for name in ("large_scale", "small_scale", "aspect_ratio")})
        return self
