"""The modality as data: what a slice's stored values are, and how they become model input. One member a modality.

A model's input contract is one member; it travels in every export. This module holds settings alone and imports no torch:
`meddino.data.model_input` computes by them.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from meddino.core.config import StrictConfig, check_config

Modality = Literal["ct", "mr", "image"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
Units = Literal["hounsfield", "arbitrary", "brightness"]
"""Hounsfield units; arbitrary: a volume's own range says what is dark and bright; brightness: the range of 8 or 16 bits."""

Window = Literal["soft_tissue", "lung", "bone", "brain"]
CT_WINDOWS_HU: dict[Window, tuple[float, float]] = {
    "soft_tissue": (40.0, 400.0),
    "lung": (-600.0, 1500.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
}
"""Level and width [HU] of the usual windows for looking at CT."""

RANGE_PERCENTILES = (0.5, 99.5)
"""Percentiles of a volume that become 0 and 1 where units are arbitrary, as in nnU-Net's clipping of foreground."""


def window_text(window: Window = "soft_tissue") -> str:
    """Return a window's name with its numbers, for captions."""
    level, width = CT_WINDOWS_HU[window]
    return f"{window.replace('_', '-')} window (level {level:g}, width {width:g} HU)"


class CTIntensity(StrictConfig):
    """Hounsfield units, stored as int16: clipped to a window, then normalised.

    The defaults are those of MedDINOv3's released code: clamp HU to [-1000, 1000], subtract 65.108, divide by 178.017,
    repeat to three channels (where the two numbers come from is published nowhere).
    """

    modality: Literal["ct"] = "ct"
    """Hounsfield units."""
    hu_min: float = -1000.0
    """Lower end of the clip window [HU]; MedDINOv3's code: -1000."""
    hu_max: float = 1000.0
    """Upper end of the clip window [HU]; MedDINOv3's code: 1000."""
    mean: float = 65.108
    """Subtracted after clipping [HU]; MedDINOv3's code: 65.108."""
    std: float = Field(178.017, gt=0)
    """Divisor after that [HU]; MedDINOv3's code: 178.017."""
    channels: int = Field(3, ge=1)
    """The grey image is repeated this often; DINOv3 weights: 3."""

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> "CTIntensity":
        if self.hu_min >= self.hu_max:
            raise ValueError(f"hu_min {self.hu_min} must be below hu_max {self.hu_max}")
        return self

    @property
    def channel_mean(self) -> tuple[float, ...]:
        """What is subtracted from each channel."""
        return (self.mean,) * self.channels

    @property
    def channel_std(self) -> tuple[float, ...]:
        """What each channel is divided by."""
        return (self.std,) * self.channels

    @property
    def shown_range(self) -> tuple[float, float]:
        """Stored values [HU] that the model tells apart: the clip window."""
        return self.hu_min, self.hu_max

    @property
    def in_words(self) -> str:
        """How stored values become model input, for cards and messages."""
        return (
            f"Hounsfield units, clipped to [{self.hu_min:g}, {self.hu_max:g}], minus {self.mean:g}, "
            f"over {self.std:g}, repeated to {self.channels} channels"
        )


class MRIntensity(StrictConfig):
    """Arbitrary units, stored as they are: two percentiles of the volume become 0 and 1, then normalised.

    The percentiles are kept beside the slice, so that a slice near the end of a volume is not stretched by itself.
    """

    modality: Literal["mr"] = "mr"
    """Arbitrary units."""
    mean: float = 0.449
    """Subtracted from values in [0, 1]; the mean of ImageNet's three channels, as DINOv3's weights expect."""
    std: float = Field(0.226, gt=0)
    """Divisor after that; the mean of ImageNet's three."""
    channels: int = Field(3, ge=1)
    """The grey image is repeated this often; DINOv3 weights: 3."""

    @property
    def channel_mean(self) -> tuple[float, ...]:
        """What is subtracted from each channel."""
        return (self.mean,) * self.channels

    @property
    def channel_std(self) -> tuple[float, ...]:
        """What each channel is divided by."""
        return (self.std,) * self.channels

    @property
    def shown_range(self) -> tuple[float, float]:
        """Values that the model tells apart, once the volume's percentiles are 0 and 1."""
        return 0.0, 1.0

    @property
    def in_words(self) -> str:
        """How stored values become model input, for cards and messages."""
        low, high = RANGE_PERCENTILES
        return (
            f"MR in arbitrary units; the volume's {low:g} and {high:g} percentiles become 0 and 1, clipped to them, "
            f"minus {self.mean:g}, over {self.std:g}, repeated to {self.channels} channels"
        )


class BrightnessIntensity(StrictConfig):
    """Brightness in 8 or 16 bits, grey or RGB: the range of the stored type becomes [0, 1], then normalised.

    Grey is repeated to the channels; RGB becomes grey (its mean) where the model has one channel.
    """

    modality: str
    """A modality whose units are brightness."""
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), min_length=1)
    """Subtracted from each channel's values in [0, 1]; ImageNet's, as DINOv3's weights expect."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.229, 0.224, 0.225), min_length=1)
    """Divisor of each channel after that; ImageNet's."""

    @model_validator(mode="after")
    def _channels_agree(self) -> "BrightnessIntensity":
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(f"mean has {len(self.mean)} and std {len(self.std)} channels; both have 1 or both have 3")
        return self

    @property
    def channels(self) -> int:
        """Channels of the model input."""
        return len(self.mean)

    @property
    def channel_mean(self) -> tuple[float, ...]:
        """What is subtracted from each channel."""
        return self.mean

    @property
    def channel_std(self) -> tuple[float, ...]:
        """What each channel is divided by."""
        return self.std

    @property
    def shown_range(self) -> tuple[float, float]:
        """Values that the model tells apart, once the stored type's range is 0 to 1."""
        return 0.0, 1.0

    @property
    def in_words(self) -> str:
        """How stored values become model input, for cards and messages."""
        return (
            f"brightness, grey or RGB; the stored range becomes 0 to 1, minus {list(self.mean)}, over {list(self.std)}, "
            f"{self.channels} channels (grey is repeated)"
        )


class ImageIntensity(BrightnessIntensity):
    """Pictures of medicine: radiographs, fundus, dermoscopy, endoscopy, pathology."""

    modality: Literal["image"] = "image"
    """Brightness, grey or RGB."""


def _modality_of(given: Any) -> Any:
    """Return the tag of a member; runs and exports written before there were others name none: they are CT."""
    if isinstance(given, dict):
        return given.get("modality", "ct")
    return getattr(given, "modality", None)


_NAMES = f"{', '.join(MODALITIES[:-1])} or {MODALITIES[-1]}"

Intensity = Annotated[
    Annotated[CTIntensity, Tag("ct")] | Annotated[MRIntensity, Tag("mr")] | Annotated[ImageIntensity, Tag("image")],
    Discriminator(_modality_of, custom_error_type="modality", custom_error_message=f"modality must be {_NAMES}"),
]
"""A model's input contract, or one of those that a run trains with."""


@dataclass(frozen=True)
class Member:
    """What is said of a modality wherever it is read, trained on, or told about.

    Attributes:
        units: Of its stored values: how they are recognised, ranged and refused.
        dicom_codes: DICOM's codes of the modality; of volumes exactly one, of pictures any of them.
        values_are: What stored values are, for messages.
        shown: Which of them are black and white in pictures for people, for captions.
        given: What a model of it is given, in the words of its card.
        seen: What it sees, for the card's first line.
        tag: Of the card, as hubs have it.
    """

    units: Units
    dicom_codes: tuple[str, ...]
    values_are: str
    shown: str
    given: str
    seen: str
    tag: str


MEMBERS: dict[Modality, Member] = {
    "ct": Member(
        "hounsfield",
        ("CT",),
        "CT in Hounsfield units",
        f"CT in the {window_text()}",
        given="axial slices in Hounsfield units",
        seen="axial CT slices",
        tag="computed-tomography",
    ),
    "mr": Member(
        "arbitrary",
        ("MR",),
        "MR in arbitrary units",
        "MR in its volume's range",
        given="axial slices of MR, scaled so that the volume's 0.5 and 99.5 percentiles are 0 and 1",
        seen="axial MR slices",
        tag="magnetic-resonance-imaging",
    ),
    "image": Member(
        "brightness",
        ("CR", "DX", "MG", "US", "OP", "OPT"),
        "pictures in 8 or 16 bits of brightness",
        "pictures in their type's range",
        given="pictures of medicine, scaled so that black and white are 0 and 1",
        seen="medical pictures",
        tag="medical-imaging",
    ),
}
OF_DICOM_CODE: dict[str, Modality] = {code: name for name, member in MEMBERS.items() for code in member.dicom_codes}
"""Modality behind DICOM's code of one."""


class _Contract(StrictConfig):
    """An input contract where it stands alone in a file."""

    input_contract: Intensity
    """How stored values become model input."""


def read_intensity(values: Any, where: str) -> Intensity:
    """Check an input contract from a file.

    Args:
        values: A mapping; without `modality` it is CT, as everything written before there were other members.
        where: Where it came from, for the message.

    Raises:
        ConfigError: Names every wrong key.
    """
    return check_config(_Contract, {"input_contract": values}, where).input_contract
