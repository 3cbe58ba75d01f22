"""network.json: what `meddino-eval predict` must know of a finished `segment` run to use its networks on new volumes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.config import load_config
from meddino.core.device import find_machine, use_cpu_threads
from meddino.core.errors import CheckpointError, ConfigError, VolumeError
from meddino.core.files import sha256_file, write_json
from meddino.data.intensity import Modality, read_intensity
from meddino.volumes.geometry import Geometry
from meddino_evaluation.data.labels import LabelScheme
from meddino_evaluation.data.prepare import GridRule, PreparedCase, prepare_volume
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.experiment import Experiment, sliding_window
from meddino_evaluation.segmentation.inference.postprocess import keep_largest
from meddino_evaluation.segmentation.inference.volumes import Member, predict_together
from meddino_evaluation.segmentation.networks.build import build_network, head_request
from meddino_evaluation.segmentation.networks.encoders import load_encoder, widened
from meddino_evaluation.segmentation.training.fitting import load_network, weights_path

FILE = "network.json"


@dataclass(frozen=True)
class Bundle:
    """Trained networks, ready for new volumes.

    Attributes:
        members: The networks of each fold.
        rules: The in-plane grid of each fold.
        labels: Meaning of the outputs.
        channels: Image channels that are read.
        components: Labels of which only the largest component is kept: those of which every network says so.
        identity: Hash of all that decides what is predicted.
        flat: Networks of pictures.
    """

    members: tuple[Member, ...]
    rules: tuple[GridRule, ...]
    labels: LabelScheme
    channels: int
    components: tuple[str, ...]
    identity: str
    flat: bool = False

    @property
    def size(self) -> int:
        """Number of networks."""
        return sum(len(member.networks) for member in self.members)

    @property
    def modality(self) -> Modality:
        """What the values of a volume mean."""
        return self.members[0].networks[0].contract.given

    def predict(self, name: str, array: NDArray[Any], geometry: Geometry) -> tuple[NDArray[np.int32], PreparedCase]:
        """Return the label values [Z, Y, X] of a volume [C, Z, Y, X], on its own voxels, and the volume as it was seen.

        Raises:
            VolumeError: It has too few channels, or cannot be prepared.
        """
        if len(array) < self.channels:
            raise VolumeError(f"{name}: {len(array)} channels, the network reads {self.channels}")
        cases = [prepare_volume(name, array[: self.channels], geometry, rule, modality=self.modality) for rule in self.rules]
        return keep_largest(predict_together(self.members, cases), self.labels, self.components), cases[0]


def write_bundle(experiment: Experiment, out: Path) -> None:
    """Write network.json of a run."""
    folds = {}
    for split in experiment.splits:
        own = experiment.fold_source(split).contract.own
        folds[str(split.number)] = {
            "rule": asdict(experiment.grid_rule(split)),
            "input_contract": own.model_dump(mode="json") if own is not None else None,
        }
    content = {
        "format": "meddino-segmentation-network",
        "model": str(Path(experiment.source.name).absolute())
        if Path(experiment.source.name).exists()
        else experiment.source.name,
        "model_hash": experiment.source.model_hash,
        "labels": asdict(experiment.dataset.labels),
        "modality": experiment.dataset.modality,
        "flat": experiment.dataset.flat,
        "channels": len(experiment.channels),
        "input_channels": experiment.input_channels,
        "folds": folds,
    }
    write_json(out / FILE, content)


def load_bundle(results: Path, folds: Sequence[int] | None, seeds: Sequence[int] | None, model: str | None = None) -> Bundle:
    """Load networks that `meddino-eval segment` has trained.

    Args:
        results: Its --out folder.
        folds: Which folds'; None for all that were run.
        seeds: Which seeds'; None for all.
        model: Where the encoder is now, if it has moved.

    Raises:
        ConfigError: The folder is no finished run, or has no such fold or seed.
        CheckpointError: A file is damaged, or the encoder is another one.
    """
    path = results / FILE
    if not path.is_file():
        raise ConfigError(f"{results} is no finished run of `meddino-eval segment`: {FILE} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts, own = {int(fold): part for fold, part in content["folds"].items()}, content["labels"]
        regions = None if own["region_values"] is None else tuple(own["region_values"])
        labels = LabelScheme(
            tuple(own["names"]),
            tuple(tuple(group) for group in own["values"]),
            own["ignore"],
            regions,
            tuple(own.get("as_background", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    config = load_config(SegmentConfig, [results / "config.yaml"])
    folds, seeds = sorted(parts) if folds is None else folds, config.seeds if seeds is None else seeds
    if not set(folds) <= parts.keys() or not set(seeds) <= set(config.seeds):
        raise ConfigError(
            f"{results} has folds {sorted(parts)} and seeds {list(config.seeds)}, not folds {list(folds)}, seeds {list(seeds)}"
        )
    use_cpu_threads()
    machine = find_machine(config.device, config.precision)
    source = load_encoder(model or content["model"], config.encoder.random_seed)
    modality = content.get("modality", "ct")
    source = replace(source, contract=replace(source.contract, given=modality))
    if source.model_hash != content["model_hash"]:
        raise CheckpointError(f"model {source.name} has other weights than the one {results} was trained with")
    source = widened(source, content["input_channels"])
    request = head_request(
        source.backbone, config.encoder, content["input_channels"], config.training.crop_px, labels.num_outputs
    )
    members, components = [], []
    for fold in folds:
        fold_source = source
        own = parts[fold].get("input_contract", parts[fold].get("hu"))  # "hu": written when all was CT
        if own is not None:
            fold_source = replace(source, contract=replace(source.contract, own=read_intensity(own, str(path))))
        networks = tuple(build_network(fold_source, config.encoder, config.head.name, request, seed) for seed in seeds)
        for network, seed in zip(networks, seeds, strict=True):
            components.append(load_network(network, weights_path(results, fold, seed)))
            network.to(machine.device).eval()
        members.append(Member(networks, labels, sliding_window(config), config.data.neighbour_slices, machine))
    kept = tuple(name for name in labels.names if all(name in one for one in components))
    rules = tuple(GridRule(**parts[fold]["rule"]) for fold in folds)
    identity = _identity([path, results / "config.yaml", *(weights_path(results, f, seed) for f in folds for seed in seeds)])
    return Bundle(tuple(members), rules, labels, content["channels"], kept, identity, content.get("flat", False))


def _identity(files: Sequence[Path]) -> str:
    return hashlib.sha256(" ".join(map(sha256_file, files)).encode()).hexdigest()
