"""Published segmentation sets laid out as nnU-Net raw data sets, by links; nothing is copied or changed."""

from pathlib import Path

from meddino.core.errors import ConfigError
from meddino.core.files import write_json
from meddino_evaluation.classification.dataset_config import DatasetConfig, SegmentationLayout


def prepare_segmentation(config: DatasetConfig, root: Path, out: Path) -> int:
    """Link images and label maps into nnU-Net's raw layout and write dataset.json.

    Args:
        config: A definition with task segmentation.
        root: Folder of the published set.
        out: Folder to make, e.g. Dataset009_Spleen.

    Returns:
        The number of cases.

    Raises:
        ConfigError: The definition is of another task, no image is found, or a label map is missing; names them.
    """
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
