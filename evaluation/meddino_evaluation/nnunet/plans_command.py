"""`meddino-eval nnunet-plans`: nnU-Net plans under which its own preprocessing applies a model's input contract."""

import argparse
import copy
import json
import os
from pathlib import Path
from typing import Any

from meddino.checkpoints.export.model import Model, load
from meddino.core.errors import ConfigError
from meddino.core.files import write_json
from meddino.data.intensity import CTIntensity

CONFIGURATION = "2d"
INTENSITIES = "foreground_intensity_properties_per_channel"
PREPROCESSED_VARIABLE = "nnUNet_preprocessed"
TRAINER_FOLDER = Path(__file__).parent / "trainer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("dataset", help="folder name in nnUNet_preprocessed (Dataset901_SarcomaCT) or its number")
    parser.add_argument("--model", type=Path, required=True, help="folder made by meddino-export")
    parser.add_argument("--preprocessed", type=Path, help="nnU-Net's folder (default: $nnUNet_preprocessed)")
    parser.add_argument("--plans", default="nnUNetPlans", help="plans to start from, of nnUNetv2_plan_experiment")
    parser.add_argument("--name", default="MedDINOPlans", help="name of the new plans")
    parser.add_argument("--side-px", type=int, default=896, help="side of the patches; the spacing follows (paper: 896)")
    parser.add_argument("--batch-size", type=int, help="slices in a batch (default: as in the plans)")


def run(arguments: argparse.Namespace) -> None:
    """Write the plans and print the next commands."""
    root = arguments.preprocessed or (Path(value) if (value := os.environ.get(PREPROCESSED_VARIABLE)) else None)
    if root is None:
        raise ConfigError("nnU-Net's folder is not known; set nnUNet_preprocessed or give --preprocessed DIR")
    folder = _dataset_folder(root, arguments.dataset)
    model = load(arguments.model)
    plans = make_plans(
        _read(folder / f"{arguments.plans}.json"), model, arguments.name, arguments.side_px, arguments.batch_size
    )
    plans["meddino"]["model"] = str(arguments.model.resolve())
    write_json(folder / f"{arguments.name}.json", plans)
    dataset = folder.name
    print(f"export nnUNet_extTrainer={TRAINER_FOLDER}")  # noqa: T201 - what the user types next
    print(f"nnUNetv2_preprocess -d {dataset[7:10]} -plans_name {arguments.name} -c {CONFIGURATION}")  # noqa: T201
    print(f"nnUNetv2_train {dataset} {CONFIGURATION} 0 -tr MedDINOTrainer -p {arguments.name}")  # noqa: T201


def make_plans(plans: dict[str, Any], model: Model, name: str, side_px: int, batch_size: int | None = None) -> dict[str, Any]:
    """Return plans for a model.

    nnU-Net's CT normalisation clips to two percentiles, subtracts a mean and divides by a standard deviation, all of the
    training set. With the contract's numbers in their place it is the contract.

    Args:
        plans: nnU-Net's own, with a 2D configuration.
        model: Whose contract and architecture they carry.
        name: Of the new plans.
        side_px: Side of the patches; a multiple of the model's patch size.
        batch_size: None keeps the plans' own.

    Raises:
        ConfigError: There is no 2D configuration, or the side does not fit.
    """
    if CONFIGURATION not in plans.get("configurations", {}):
        raise ConfigError(f"the plans have no configuration '{CONFIGURATION}': {', '.join(plans.get('configurations', {}))}")
    if side_px % model.patch_size or side_px <= 0:
        raise ConfigError(f"--side-px {side_px} is no multiple of the model's patch size {model.patch_size}")
    plain = copy.deepcopy(plans)
    old = plain["configurations"][CONFIGURATION]
    # The patch covers what it covered, in more or fewer pixels.
    factors = [side_px / side for side in old["patch_size"]]
    new = {
        **old,
        "data_identifier": f"{name}_{CONFIGURATION}",
        "patch_size": [side_px, side_px],
        "spacing": [spacing / factor for spacing, factor in zip(old["spacing"], factors, strict=True)],
        "median_image_size_in_voxels": [
            size * factor for size, factor in zip(old["median_image_size_in_voxels"], factors, strict=True)
        ],
        "batch_size": batch_size or old["batch_size"],
        "normalization_schemes": ["CTNormalization"] * len(old["normalization_schemes"]),
        "use_mask_for_norm": [False] * len(old["normalization_schemes"]),
    }
    contract = model.contract
    if not isinstance(contract, CTIntensity):
        raise ConfigError(
            f"the model's input contract is of modality '{contract.modality}'; nnU-Net's plans hold one of modality 'ct'"
        )
    properties = {
        "mean": contract.mean,
        "std": contract.std,
        "percentile_00_5": contract.hu_min,
        "percentile_99_5": contract.hu_max,
        "min": contract.hu_min,
        "max": contract.hu_max,
        "median": contract.mean,
    }
    return {
        **plain,
        "plans_name": name,
        "configurations": {CONFIGURATION: new},
        INTENSITIES: dict.fromkeys(plain[INTENSITIES], properties),
        "meddino": {
            "architecture": model.backbone.config.model_dump(mode="json"),
            "weights_sha256": model.config.weights.sha256,
        },
    }


def _dataset_folder(root: Path, dataset: str) -> Path:
    wanted = f"Dataset{int(dataset):03d}_" if dataset.isdigit() else dataset
    found = [path for path in sorted(root.glob("Dataset*")) if path.is_dir() and path.name.startswith(wanted)]
    if len(found) != 1:
        known = ", ".join(path.name for path in sorted(root.glob("Dataset*"))) or "none"
        raise ConfigError(f"no data set '{dataset}' in {root} (there: {known}); run nnUNetv2_plan_and_preprocess first")
    return found[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} are no readable plans ({error}); run nnUNetv2_plan_experiment first") from error
    return dict(content)
