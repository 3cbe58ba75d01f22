"""How slices of any modality become model input in training: what loader and batches know of intensities.

A row of numbers travels with every view: which modality it is, the range of its volume's values, then what its modality drew.
Whoever makes batches hands rows on without looking into them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from torch import Tensor

from meddino.core.errors import ConfigError
from meddino.core.seeds import numpy_rng
from meddino.data.intensity import MODALITIES, BrightnessIntensity, CTIntensity, Intensity, Modality
from meddino.data.model_input import normalise_channels, to_unit
from meddino_pretrain.data.augmentations import CHANGES, apply_ct
from meddino_pretrain.data.config import AugmentConfig
from meddino_pretrain.data.distortions import distort_slice

_OWN = 3  # columns before what a modality draws: its number, lowest and highest value of the range
COLUMNS = _OWN + max(changes.columns for changes in CHANGES.values())


@dataclass(frozen=True)
class StoredSlice:
    """A slice as it lies in the corpus.

    Attributes:
        values: [rows, cols], or [rows, cols, 3] of a colour picture; never changed in place.
        modality: What they mean.
        value_range: Values that become 0 and 1; None for CT, whose unit says it.
    """

    values: NDArray[Any]
    modality: Modality = "ct"
    value_range: tuple[float, float] | None = None

    @property
    def span(self) -> float:
        """Stored values between 0 and 1 of the model's scale; 1 for CT."""
        return 1.0 if self.value_range is None else self.value_range[1] - self.value_range[0]


@dataclass(frozen=True)
class Intensities:
    """How the slices of a corpus become model input, whatever their modality.

    Attributes:
        contracts: One a modality; the first is the model's own, which an export carries.
        augment: What chance does to them.
    """

    contracts: tuple[Intensity, ...]
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    @property
    def host_dtype(self) -> torch.dtype:
        """Type that views are kept in on the host: int16 where all is CT, else float32."""
        return torch.int16 if all(isinstance(contract, CTIntensity) for contract in self.contracts) else torch.float32

    @property
    def host_channels(self) -> tuple[int, ...]:
        """Axes of a view on the host before its rows: (3,) where pictures may have colour, else none."""
        return (3,) if any(isinstance(one, BrightnessIntensity) and one.channels == 3 for one in self.contracts) else ()

    def contract(self, modality: Modality) -> Intensity:
        """Return the contract of a modality.

        Raises:
            ConfigError: The recipe has none.
        """
        for contract in self.contracts:
            if contract.modality == modality:
                return contract
        known = ", ".join(contract.modality for contract in self.contracts)
        raise ConfigError(
            f"the corpus holds slices of modality '{modality}', the recipe has contracts for {known}: "
            "add one to other_contracts, or train on a corpus without them"
        )

    def check(self, modalities: Iterable[Modality]) -> None:
        """Refuse a corpus that holds a modality without a contract.

        Raises:
            ConfigError: Names it.
        """
        for modality in modalities:
            self.contract(modality)

    def empty(self, kinds: int, samples: int, side_px: int) -> Shaped[Tensor, "kinds samples *c h w"]:
        """Return room on the host for square views."""
        return torch.empty(kinds, samples, *self.host_channels, side_px, side_px, dtype=self.host_dtype)

    def on_host(self, crop: Shaped[Tensor, "*c h w"]) -> Shaped[Tensor, "*c2 h w"]:
        """Bring one view to the layout of `empty`: grey is repeated where others have colour, colour becomes grey else."""
        if self.host_channels:
            return crop.expand(*self.host_channels, *crop.shape[-2:]).to(self.host_dtype)
        return (crop.mean(0) if crop.ndim == 3 else crop).to(self.host_dtype)

    def distort(self, stored: StoredSlice, seed: int, number: int) -> NDArray[Any]:
        """Return a slice's values after low resolution, smoothing and noise, each by chance; see `distort_slice`."""
        return distort_slice(stored.values, self.augment.of(stored.modality), stored.span, seed, number)

    def draw(self, stored: StoredSlice, seed: int, number: int, views: int) -> NDArray[np.float32]:
        """Draw what happens to the intensities of each view of a sample.

        Args:
            stored: The slice.
            seed: The stage's seed.
            number: Global sample number.
            views: Of the sample; row v is the same whatever their number.

        Returns:
            float32 [views, COLUMNS].
        """
        rng = numpy_rng(seed, "intensity", number)
        config, contract = self.augment.of(stored.modality), self.contract(stored.modality)
        return _rows(stored, CHANGES[stored.modality].draw(config, contract, rng, views))

    def plain(self, stored: StoredSlice) -> NDArray[np.float32]:
        """Return the row [1, COLUMNS] of a slice as the model's user would give it."""
        contract = self.contract(stored.modality)
        return self.chosen(stored, contract.shown_range if isinstance(contract, CTIntensity) else (0.0, 0.0), 1.0)

    def chosen(self, stored: StoredSlice, ct_window: tuple[float, float], contrast: float) -> NDArray[np.float32]:
        """Return the row [1, COLUMNS] of a view with a window (CT) and a change of contrast (a gamma; of pictures a factor)."""
        own = CHANGES[self.contract(stored.modality).modality].chosen(ct_window, contrast)
        return _rows(stored, np.array([own], dtype=np.float32))

    def apply(
        self, values: Shaped[Tensor, "b *c h w"], rows: Float[Tensor, "b columns"], undistorted: bool = False
    ) -> Float[Tensor, "b c2 h w"]:
        """Turn a batch of views into model input: each sample by its own modality.

        Args:
            values: Stored values of type `host_dtype`, with `host_channels`.
            rows: From `draw`, one a view; on the host.
            undistorted: Leave away what chance does, but for CT's window; for views that are not augmented.
        """
        numbers = rows[:, 0].tolist()
        found = sorted(set(numbers))
        if len(found) == 1:
            return self._apply(MODALITIES[int(found[0])], values, rows, undistorted)
        images = torch.empty(len(values), self.contracts[0].channels, *values.shape[-2:], device=values.device)
        for number in found:
            chosen = [i for i, other in enumerate(numbers) if other == number]
            images[chosen] = self._apply(MODALITIES[int(number)], values[chosen], rows[chosen], undistorted)
        return images

    def _apply(self, modality: Modality, values: Tensor, rows: Tensor, undistorted: bool) -> Tensor:
        contract, changes = self.contract(modality), CHANGES[modality]
        drawn = rows[:, _OWN : _OWN + changes.columns]
        grey = values if values.ndim == 3 else values[:, 0]  # on the host grey is repeated where others have colour
        if isinstance(contract, CTIntensity):
            return apply_ct(grey, drawn, contract, undistorted)
        has_colour = isinstance(contract, BrightnessIntensity) and values.ndim == 4
        unit = to_unit(values if has_colour else grey[:, None], rows[:, 1:_OWN])
        return normalise_channels(unit if undistorted or changes.change is None else changes.change(unit, drawn), contract)


def _rows(stored: StoredSlice, own: NDArray[np.float32]) -> NDArray[np.float32]:
    rows = np.zeros((len(own), COLUMNS), dtype=np.float32)
    rows[:, 0] = MODALITIES.index(stored.modality)
    rows[:, 1:_OWN] = stored.value_range or (0.0, 1.0)
    rows[:, _OWN : _OWN + own.shape[1]] = own
    return rows
