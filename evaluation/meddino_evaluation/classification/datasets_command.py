"""`meddino-eval datasets list | init | fake | prepare | check`: definitions, tiny fake copies, and nnU-Net raw layout."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from meddino.core.errors import ConfigError
from meddino.core.files import write_json

if TYPE_CHECKING:
    from meddino_evaluation.classification.dataset_config import DatasetConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval datasets`."""
    parser.add_argument(
        "action",
        choices=["list", "init", "fake", "prepare", "check"],
        help="list: what is shipped; init: write the definition of a folder or CSV; fake: a tiny copy in the real layout; "
        " prepare: a segmentation set as nnU-Net raw; check: read every case of --root",
    )
    parser.add_argument("name", nargs="?", help="shipped name or YAML file; init: folder of class folders, or CSV")
    parser.add_argument("--root", type=Path, help="folder of the data set (prepare, check)")
    parser.add_argument("--out", type=Path, help="folder to write (fake, prepare)")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval datasets`."""
    from meddino.core.config import shipped_configs
    from meddino_evaluation.classification.datasets import load_dataset_config, open_dataset
    from meddino_evaluation.classification.fake_data import make_fake
    from meddino_evaluation.classification.images import read_slices
    from meddino_evaluation.classification.recognise import write_definition

    if arguments.action == "list":
        for path in sorted((shipped_configs() / "evaluation" / "datasets").glob("*.yaml")):
            config = load_dataset_config(path)
            sys.stdout.write(f"{config.name:22} {config.task:13} {config.licence:45} {config.title}\n")
            if config.notes:
                sys.stdout.write(f"{'':22} {config.notes}\n")
        return
    needed = {"init": ("name", "out"), "fake": ("name", "out"), "prepare": ("name", "root", "out"), "check": ("name", "root")}[
        arguments.action
    ]
    missing = [f"--{one}" if one != "name" else "a name" for one in needed if getattr(arguments, one) is None]
    if missing:
        raise ConfigError(f"meddino-eval datasets {arguments.action} needs {', '.join(missing)}")
    if arguments.action == "init":
        config = write_definition(Path(arguments.name), arguments.out)
        sys.stdout.write(f"{arguments.out}: {config.task}, classes {', '.join(config.classes)}; add title and licence\n")
    elif arguments.action == "fake":
        make_fake(arguments.name, arguments.out)
    elif arguments.action == "prepare":
        count = prepare_segmentation(load_dataset_config(arguments.name), arguments.root, arguments.out)
        sys.stdout.write(f"{count} cases in {arguments.out}; now: meddino-eval segment --data {arguments.out} ...\n")
    else:
        config = load_dataset_config(arguments.name)
        dataset = open_dataset(config, arguments.root)
        for case in dataset.cases:
            read_slices(case.source, config.modality)
        patients = len({case.patient for case in dataset.cases})
        sys.stdout.write(f"{config.name}: {len(dataset.cases)} cases of {patients} patients, all readable\n")


def prepare_segmentation(config: "DatasetConfig", root: Path, out: Path) -> int:
    """Link images and label maps into nnU-Net's raw layout and write dataset.json; nothing is copied or changed.

    Args:
        config: A definition with task segmentation.
        root: Folder of the published set.
        out: Folder to make, e.g. Dataset009_Spleen.

    Returns:
        The number of cases.

    Raises:
        ConfigError: The definition is of another task, no image is found, or a label map is missing; names them.
    """
    from meddino_evaluation.classification.dataset_config import SegmentationLayout

    layout = config.layout
    if not isinstance(layout, SegmentationLayout):
        raise ConfigError(
            f"data set {config.name} is for {config.task}, not for segmentation; use meddino-eval linear and its kin"
        )
    before, _, after = Path(layout.images).name.partition("*")
    images = sorted(path for path in root.glob(layout.images) if not path.name.startswith("."))
    if not images:
        raise ConfigError(f"data set {config.name}: no images {root / layout.images}; get the data from {config.url}")
    pairs = {}
    for image in images:
        case = image.name[len(before) : len(image.name) - len(after)]
        pairs[f"{config.name}_{case}"] = (image, root / layout.labels.replace("*", case))
    missing = [str(label.relative_to(root)) for _, label in pairs.values() if not label.is_file()]
    if missing:
        raise ConfigError(f"data set {config.name}: label maps are missing: {', '.join(missing[:5])}")
    for case, (image, label) in pairs.items():
        for folder, name, target in (("imagesTr", f"{case}_0000.nii.gz", image), ("labelsTr", f"{case}.nii.gz", label)):
            link = out / folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(target.resolve())
    labels = {"background": 0} | {name: value for value, name in enumerate(config.classes, start=1)}
    write_json(
        out / "dataset.json",
        {
            "channel_names": {"0": layout.channel},
            "labels": labels,
            "numTraining": len(pairs),
            "file_ending": ".nii.gz",
            "name": config.name,
            "reference": config.citation,
            "licence": config.licence,
        },
    )
    return len(pairs)
