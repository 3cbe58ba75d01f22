"""network.json: what `meddino-eval predict` must know of a finished `segment` run to use its networks on new volumes."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from meddino.core.config import load_config
from meddino.core.device import Machine, find_machine, use_cpu_threads
from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.files import write_json
from meddino.data.intensity import read_intensity
from meddino_evaluation.data.labels import LabelScheme
from meddino_evaluation.data.prepare import GridRule, PreparedCase
from meddino_evaluation.segmentation.config import SegmentConfig
from meddino_evaluation.segmentation.experiment import Experiment, sliding_window
from meddino_evaluation.segmentation.inference.postprocess import keep_largest
from meddino_evaluation.segmentation.inference.volumes import predict_case
from meddino_evaluation.segmentation.networks.build import build_network, head_request
from meddino_evaluation.segmentation.networks.encoders import load_encoder
from meddino_evaluation.segmentation.networks.network import SegmentationNetwork
from meddino_evaluation.segmentation.training.trained import load_network, weights_path

FILE = "network.json"


@dataclass(frozen=True)
class Bundle:
    """A trained network, ready for new volumes.

    Attributes:
        config: Settings it was trained with.
        network: Encoder and head.
        labels: Meaning of its outputs.
        rule: In-plane grid.
        channels: Image channels it reads.
        components: Labels of which only the largest component is kept.
        machine: Device and arithmetic.
    """

    config: SegmentConfig
    network: SegmentationNetwork
    labels: LabelScheme
    rule: GridRule
    channels: int
    components: tuple[str, ...]
    machine: Machine

    def predict(self, case: PreparedCase) -> Any:
        """Return the label values [Z, Y, X] of a prepared volume, on its own voxels."""

        def forward(images: Any) -> Any:
            with self.machine.autocast():
                return self.network(images)

        found = predict_case(
            case,
            forward,
            1,
            self.network.contract,
            self.labels,
            sliding_window(self.config),
            self.config.data.neighbour_slices,
            self.machine,
        )[0]
        return keep_largest(found, self.labels, self.components)


def write_bundle(experiment: Experiment, out: Path) -> None:
    """Write network.json of a run."""
    folds = {}
    for split in experiment.splits:
        hu = experiment.fold_source(split).contract.hu
        folds[str(split.fold)] = {
            "rule": asdict(experiment.grid_rule(split)),
            "hu": hu.model_dump(mode="json") if hu is not None else None,
        }
    content = {
        "format": "meddino-segmentation-network",
        "model": str(Path(experiment.source.name).absolute())
        if Path(experiment.source.name).exists()
        else experiment.source.name,
        "model_hash": experiment.source.model_hash,
        "labels": asdict(experiment.dataset.labels),
        "channels": len(experiment.channels),
        "input_channels": experiment.input_channels,
        "folds": folds,
    }
    write_json(out / FILE, content)


def load_bundle(results: Path, fold: int, seed: int, model: str | None = None) -> Bundle:
    """Load a network that `meddino-eval segment` has trained.

    Args:
        results: Its --out folder.
        fold: Which fold's.
        seed: Which seed's.
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
        part = content["folds"].get(str(fold))
        names, values = content["labels"]["names"], content["labels"]["values"]
        regions = content["labels"]["region_values"]
        labels = LabelScheme(
            tuple(names),
            tuple(tuple(group) for group in values),
            content["labels"]["ignore"],
            None if regions is None else tuple(regions),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    config = load_config(SegmentConfig, [results / "config.yaml"])
    if part is None or seed not in config.seeds:
        raise ConfigError(
            f"{results} has folds {sorted(content['folds'])} and seeds {list(config.seeds)}, not fold {fold}, seed {seed}"
        )
    use_cpu_threads()
    machine = find_machine(config.device, config.precision)
    source = load_encoder(model or content["model"], config.encoder.random_seed)
    if source.model_hash != content["model_hash"]:
        raise CheckpointError(f"model {source.name} has other weights than the one {results} was trained with")
    if part["hu"] is not None:
        hu = read_intensity(part["hu"], str(path))
        source = replace(source, contract=replace(source.contract, hu=hu))
    request = head_request(
        source.backbone, config.encoder, content["input_channels"], config.training.crop_px, labels.num_outputs
    )
    network = build_network(source, config.encoder, config.head.name, request, seed)
    components = load_network(network, weights_path(results, fold, seed))
    network.to(machine.device).eval()
    return Bundle(config, network, labels, GridRule(**part["rule"]), content["channels"], components, machine)
