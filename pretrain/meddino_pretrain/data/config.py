"""What a recipe says about slices on their way to the model: reading and intensities."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig
from meddino.data.intensity import Modality

Probability = Annotated[float, Field(ge=0, le=1)]


class LoaderConfig(StrictConfig):
    """How samples are read. Nothing here changes what a batch holds."""

    workers: int = Field(0, ge=0)
    """Processes that read and crop; 0: the training process itself; ours: 0, for machines of 2 cores."""
    prefetch: int = Field(2, ge=1)
    """Micro-batches that each worker holds ready; torch's own default: 2."""
    max_corrupt: int = Field(10, ge=0)
    """Corrupt samples that others are taken for before the run stops; ours: 10."""


class Distortions(StrictConfig):
    """What is done to a slice before it is cropped, whatever its modality."""

    noise_probability: Probability = 0.1
    """Chance of Gaussian noise on a slice [0-1]; FlexiCT: 0.1."""
    smoothing_probability: Probability = 0.2
    """Chance of Gaussian smoothing of a slice [0-1]; FlexiCT: 0.2."""
    smoothing_sigma_px: tuple[float, float] = (0.5, 1.0)
    """Its width, uniform [px]; FlexiCT: 0.5-1."""
    low_resolution_probability: Probability = 0.25
    """Chance that a slice is shrunk and enlarged again [0-1]; FlexiCT: 0.25."""
    low_resolution_zoom: tuple[float, float] = (0.5, 1.0)
    """How far it is shrunk, uniform [factor]; FlexiCT: 0.5-1."""

    @property
    def noise_range(self) -> tuple[float, float]:
        """Standard deviation of the noise, lowest and highest: in HU for CT, else in shares of the volume's range."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "Distortions":
        lowest = {"noise_sd_hu": 0.0, "noise_sd": 0.0, "smoothing_sigma_px": 1e-3, "window_level_hu": -math.inf}
        for name in (key for key in type(self).model_fields if isinstance(getattr(self, key), tuple)):
            low, high = getattr(self, name)
            bound = lowest.get(name, 1e-6)
            if not bound <= low <= high:
                raise ValueError(f"{name} {[low, high]} must ascend and start at {bound} or above")
        if self.low_resolution_zoom[1] > 1:
            raise ValueError(f"low_resolution_zoom {list(self.low_resolution_zoom)} must not be above 1")
        return self


class CTAugment(Distortions):
    """What is done to CT. Colour jitter, grayscale, solarisation and crop-wise blur are not for it (FlexiCT)."""

    noise_sd_hu: tuple[float, float] = (0.0, 20.0)
    """Standard deviation of the noise, uniform [HU]; ours: 0-20, a CT's own noise."""
    scale_probability: Probability = 0.15
    """Chance of scaling a slice's intensities about the contract's mean [0-1]; FlexiCT: 0.15."""
    scale_range: tuple[float, float] = (0.75, 1.25)
    """The factor, uniform; FlexiCT: 0.75-1.25."""
    gamma_probability: Probability = 0.1
    """Chance of a gamma curve over a slice's window [0-1]; FlexiCT: 0.1."""
    gamma_range: tuple[float, float] = (0.7, 1.5)
    """The exponent, uniform; FlexiCT: 0.7-1.5."""
    window_contract_probability: Probability = 0.5
    """Chance of the input contract's own window instead of a random one [0-1]; ours: 0.5."""
    window_level_hu: tuple[float, float] = (-150.0, 150.0)
    """Centre of a random HU window, uniform [HU]; ours: -150-150."""
    window_width_hu: tuple[float, float] = (400.0, 2000.0)
    """Width of a random HU window, log-uniform [HU]; ours: 400-2000."""
    window_per: Literal["crop", "image"] = "crop"
    """Whether crops of one slice have windows of their own; ours: crop, as DINO draws colours a crop."""

    @property
    def noise_range(self) -> tuple[float, float]:
        """See `Distortions.noise_range`."""
        return self.noise_sd_hu


class MRAugment(Distortions):
    """What is done to MR: its units are arbitrary and its field is uneven."""

    noise_sd: tuple[float, float] = (0.0, 0.03)
    """Standard deviation of the noise, uniform [share of the volume's range]; ours: 0-0.03."""
    gamma_probability: Probability = 0.5
    """Chance of a gamma curve over a view [0-1]; ours: 0.5, as a random window of CT."""
    gamma_range: tuple[float, float] = (0.74, 1.35)
    """The exponent, log-uniform; TorchIO: exp(-0.3) to exp(0.3)."""
    bias_field_probability: Probability = 0.5
    """Chance of a bias field over a view [0-1]; ours: 0.5."""
    bias_field_strength: float = Field(0.5, ge=0)
    """Largest coefficient of the polynomial in its exponent; TorchIO: 0.5."""

    @property
    def noise_range(self) -> tuple[float, float]:
        """See `Distortions.noise_range`."""
        return self.noise_sd


class ImageAugment(Distortions):
    """What is done to pictures: DINO's colour jitter, for views of one picture each on its own."""

    noise_sd: tuple[float, float] = (0.0, 0.03)
    """Standard deviation of the noise, uniform [share of the range]; ours: 0-0.03."""
    jitter_probability: Probability = 0.8
    """Chance of a change of brightness, contrast and colour of a view [0-1]; DINO: 0.8."""
    brightness: float = Field(0.4, ge=0, lt=1)
    """Largest change of brightness [share]; DINO: 0.4."""
    contrast: float = Field(0.4, ge=0, lt=1)
    """Largest change of contrast [share]; DINO: 0.4."""
    saturation: float = Field(0.2, ge=0, lt=1)
    """Largest change of saturation [share]; DINO: 0.2."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Largest turn of the hue [turns]; DINO: 0.1."""

    @property
    def noise_range(self) -> tuple[float, float]:
        """See `Distortions.noise_range`."""
        return self.noise_sd


def _with_tuples(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _with_tuples(value) for key, value in values.items()}
    return tuple(values) if isinstance(values, list) else values


class AugmentConfig(StrictConfig):
    """What chance does to intensities, a field by each modality's name. Only the modalities of the corpus are read."""

    ct: CTAugment = CTAugment()
    mr: MRAugment = MRAugment()
    image: ImageAugment = ImageAugment()

    def of(self, modality: Modality) -> CTAugment | MRAugment | ImageAugment:
        """Return what chance does to a modality."""
        own: dict[Modality, CTAugment | MRAugment | ImageAugment] = {"ct": self.ct, "mr": self.mr, "image": self.image}
        return own[modality]

    @model_validator(mode="before")
    @classmethod
    def _keys_of_ct_alone(cls, values: Any) -> Any:
        """Read recipes and runs written when all was CT: its keys stood here."""
        if isinstance(values, dict) and values and not values.keys() & cls.model_fields.keys():
            values = {"ct": values}
        # What such a validator returns counts as Python's and no longer as JSON's, in which a list may be a tuple.
        return _with_tuples(values)
