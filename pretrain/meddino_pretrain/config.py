"""A pretraining recipe: everything a run depends on besides its corpus. Imports no torch: `show` and submission read it too."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator

from meddino.core.config import StrictConfig
from meddino.core.errors import ConfigError
from meddino.core.machine_config import MachineConfig
from meddino.data.intensity import MODALITIES, CTIntensity, Intensity
from meddino_pretrain.data.config import AugmentConfig, LoaderConfig
from meddino_pretrain.methods.config import MethodConfig
from meddino_pretrain.monitoring.config import DiagnosisConfig, MonitoringConfig, ProbeConfig
from meddino_pretrain.run.config import CorpusConfig, InitConfig, SavingConfig
from meddino_pretrain.schedules import ScheduleConfig

Beta = Annotated[float, Field(ge=0, lt=1)]
Step = Annotated[int, Field(ge=1)]


class BackboneConfig(StrictConfig):
    """The backbone's architecture."""

    name: str
    """Name in the registry: vits16, vitb16, vitl16, vitt16, vitnano8, ..."""
    changes: dict[str, int | float | bool | str | None] = {}
    """Fields of the architecture that differ from the named one, e.g. drop_path (FlexiCT: 0.2), qkv_bias."""


class OptimizerConfig(StrictConfig):
    """AdamW and what surrounds it."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of AdamW's first and second moments; DINOv3: 0.9, 0.999."""
    clip_grad_norm: float = Field(3.0, gt=0)
    """Largest gradient norm of the backbone and of each head; DINOv3: 3.0."""
    layerwise_decay: float = Field(0.9, gt=0, le=1)
    """Factor on lr from block to block towards the input; DINOv3: 0.9."""
    patch_embed_lr_multiplier: float = Field(0.2, ge=0)
    """Further factor on the patch embedding's lr; DINOv3: 0.2."""
    max_bad_steps: int = Field(5, ge=1)
    """Steps in a row with NaN or infinite loss or gradient, each skipped, before the run stops; ours: 5."""


class StageConfig(StrictConfig):
    """One stage, complete."""

    starts_from: str | None = None
    """Stage whose last networks it takes (its exported backbone alone, if the method is another); null: `init`."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    global_batch: int = Field(ge=2)
    """Slices in a step, over all processes and micro-batches."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches a process computes a step in; changes memory, not the result."""
    schedule: ScheduleConfig
    augment: AugmentConfig = AugmentConfig()
    method: MethodConfig
    """What is learnt, by `name`."""
    snapshot_steps: tuple[Step, ...] = ()
    """Steps after which the backbone is kept, for later stages to choose from."""

    @property
    def snapshots_beyond(self) -> list[int]:
        """The snapshot steps that the stage is too short for, as where an override shortens it."""
        return sorted(step for step in self.snapshot_steps if step > self.steps)


class PretrainConfig(StrictConfig):
    """The whole recipe."""

    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    corpus: CorpusConfig = CorpusConfig()
    init: InitConfig
    machine: MachineConfig = MachineConfig()
    input_contract: Intensity = CTIntensity()
    """How stored values become model input; exports carry it."""
    other_contracts: tuple[Intensity, ...] = ()
    """Of further modalities in the corpus, one each: a batch may hold all of them."""
    backbone: BackboneConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    loader: LoaderConfig = LoaderConfig()
    saving: SavingConfig = SavingConfig()
    probe: ProbeConfig = ProbeConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    diagnosis: DiagnosisConfig = DiagnosisConfig()
    stages: dict[str, StageConfig] = Field(min_length=1)
    """Stages by name; the order follows from starts_from."""

    @property
    def contracts(self) -> tuple[Intensity, ...]:
        """The contract of every modality that is trained on, the model's own first."""
        return self.input_contract, *self.other_contracts

    @model_validator(mode="after")
    def _contracts_fit_together(self) -> "PretrainConfig":
        modalities = [contract.modality for contract in self.contracts]
        twice = [modality for modality in MODALITIES if modalities.count(modality) > 1]
        if twice:
            raise ValueError(f"input_contract and other_contracts hold modality '{twice[0]}' twice; one contract a modality")
        channels = {contract.modality: contract.channels for contract in self.contracts}
        if len(set(channels.values())) > 1:
            raise ValueError(f"contracts of different channels, {channels}: one model has one number of them")
        return self

    @model_validator(mode="after")
    def _graph_is_sound(self) -> "PretrainConfig":
        for name, stage in self.stages.items():
            earlier = list(self.stages)[: list(self.stages).index(name)]
            if stage.starts_from is not None and stage.starts_from not in earlier:
                raise ValueError(f"stages.{name}.starts_from '{stage.starts_from}' is no stage before it; before it: {earlier}")
            kept = stage.method.kept_backbone
            if kept is None:
                continue
            if kept.stage not in earlier:
                raise ValueError(f"stages.{name}.method names the stage '{kept.stage}', which is none before it: {earlier}")
            steps = self.stages[kept.stage].steps
            if kept.step is not None and not 1 <= kept.step <= steps:
                raise ValueError(f"stages.{name}.method asks for step {kept.step} of {kept.stage}, which has {steps} steps")
        return self

    def check_stages(self, names: Sequence[str]) -> None:
        """Refuse stages that the recipe does not have.

        Raises:
            ConfigError: Names the first of them, and those there are.
        """
        unknown = [name for name in names if name not in self.stages]
        if unknown:
            raise ConfigError(f"no stage '{unknown[0]}' in this recipe; its stages: {', '.join(self.stages)}")

    def snapshots(self, stage: str) -> frozenset[int]:
        """Return the steps of a stage after which its exported backbone is kept for later stages.

        Where a later stage chooses by measurement, the stage's end is among them: quality can only have fallen by then.
        Steps beyond the end are not: an override may have shortened the stage.
        """
        steps = set(self.stages[stage].snapshot_steps) - set(self.stages[stage].snapshots_beyond)
        for later in self.stages.values():
            kept = later.method.kept_backbone
            if kept is not None and kept.stage == stage:
                steps.add(self.stages[stage].steps if kept.step is None else kept.step)
        return frozenset(steps)
