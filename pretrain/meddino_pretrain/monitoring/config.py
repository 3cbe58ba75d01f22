"""What a recipe says about watching a run."""

from pathlib import Path

from pydantic import Field

from meddino.core.config import StrictConfig


class ProbeConfig(StrictConfig):
    """How often and on how much the features are measured."""

    every_steps: int = Field(500, ge=0)
    """Steps between two probes; 0: never; ours: 500."""
    slices: int = Field(32, ge=2)
    """Fixed slices that are probed; ours: 32."""


class MonitoringConfig(StrictConfig):
    """Labelled patients that are looked at while training, and never used to choose anything."""

    probe_data: Path | None = None
    """Labelled data set that `meddino-eval probe` reads from patch tokens whenever features are measured; ours: none."""
    probe_audit: str | None = None
    """Name of the corpus's audit against it, which must have found no overlap; null: the data set's folder's name."""
    probe_settings: tuple[str, ...] = ("device=cpu",)
    """key=value for `meddino-eval probe`; ours: the CPU, so that no memory of a GPU is taken from training."""
    probe_timeout_s: float = Field(300.0, gt=0)
    """Time [s] after which a probe is given up; training waits for it; ours: 300."""


class DiagnosisConfig(StrictConfig):
    """When a rule speaks. All limits are ours, from planted cases and small runs."""

    window_steps: int = Field(50, ge=2)
    """Records that a rule takes together; ours: 50."""
    patience_steps: int = Field(1000, ge=1)
    """Steps before standing still is reported; ours: 1000."""
    chance_share: float = Field(0.995, gt=0, le=1)
    """Loss over its value by chance from which heads count as not learning; ours: 0.995."""
    uniform_share: float = Field(0.998, gt=0, le=1)
    """Entropy of the targets over its value where all outputs are equally likely, from which heads count as gone uniform; ours:
    0.998: fresh heads that learnt later stood at 0.992 to 0.9977, dead ones above."""
    min_rank: float = Field(2.0, ge=1)
    """RankMe below which CLS or patch tokens collapsed; ours: 2."""
    min_nearest_distance: float = Field(0.01, ge=0)
    """Mean distance to the nearest CLS token below which features collapsed; ours: 0.01."""
    min_cls_drift: float = Field(0.05, ge=0)
    """Change of similarities between slices below which CLS tokens are those of random weights; ours: 0.05: after 55 steps from
    scratch 0.001 where nothing was learnt (LayerScale 1e-5), 0.36 and more after 60 to 110 where it was."""
    min_patch_drift: float = Field(0.02, ge=0)
    """The same of patches within a slice; ours: 0.02: 0.1 was seen without learning, so only a standstill is named."""
    loss_growth: float = Field(0.2, gt=0)
    """Rise of the loss over its best window that counts as diverging [share of it]; ours: 0.2."""
    gradient_growth: float = Field(10.0, gt=1)
    """Growth of the gradient norm over its median so far that counts as diverging; ours: 10."""
    max_data_wait: float = Field(0.2, gt=0, le=1)
    """Share of the time waiting for data above which the loader is the limit; ours: 0.2."""
    min_neighbours_kept: float = Field(0.4, ge=0, le=1)
    """Share of nearest slices kept below which features drifted; ours: 0.4."""
    max_patch_drift: float = Field(0.3, gt=0)
    """Change of patch similarities since the start above which features drifted; ours: 0.3."""
    max_consistency_loss: float = Field(0.01, gt=0)
    """Fall of patch consistency from its best that is reported [0-1]; ours: 0.01."""
