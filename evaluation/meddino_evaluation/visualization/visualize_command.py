"""`meddino-eval visualize`: PCA and similarity maps of one image, t-SNE of a data set's features."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from meddino.data.intensity import MODALITIES, Modality

if TYPE_CHECKING:
    from meddino_evaluation.backbones.adapter import Backbone

SETTINGS = "visualize.yaml"
IMAGE_FILES = ("pca.png", "similarity.png", "image.png", "similarity.html")
FEATURES_FILES = ("tsne.png", "tsne.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval visualize`."""
    parser.add_argument("--model", required=True, help="as for the other commands")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures and pages")
    parser.add_argument("--image", help="a picture, DICOM file, volume, or file.npz#key: PCA and similarity maps")
    parser.add_argument("--slice", type=int, help="slice of a volume; the middle one by default")
    parser.add_argument("--modality", choices=MODALITIES, default="ct", help="what the values of --image are")
    parser.add_argument("--size", type=int, help="side the image is resized to, up to 2048 px; the model's own by default")
    parser.add_argument("--patch", metavar="ROW,COLUMN", help="patch of the map; the middle one by default")
    parser.add_argument("--data", help="shipped name or YAML file of a data set: t-SNE of its features")
    parser.add_argument("--root", type=Path, help="folder of that data set")


def run(arguments: argparse.Namespace) -> None:
    """Run `meddino-eval visualize`."""
    from meddino.core.errors import ConfigError
    from meddino.core.files import canonical_json
    from meddino_evaluation.backbones.load import load_backbone
    from meddino_evaluation.data.run_folder import begin, refuse_files_of_others

    with_features = bool(arguments.data and arguments.root)
    if not arguments.image and not with_features:
        raise ConfigError("nothing to show: give --image FILE, or --data NAME with --root DIR")
    files = (*(IMAGE_FILES if arguments.image else ()), *(FEATURES_FILES if with_features else ()))
    refuse_files_of_others(arguments.out, files, SETTINGS, "visualization")
    backbone = load_backbone(arguments.model)
    shown = {"model": arguments.model, "image": arguments.image, "data": arguments.data}
    begin(arguments.out, canonical_json(shown) + "\n", SETTINGS, "visualization")
    if arguments.image:
        _show_image(arguments, backbone)
    if with_features:
        _show_features(arguments, backbone)


def _show_image(arguments: argparse.Namespace, backbone: "Backbone") -> None:
    import re

    from meddino.core.errors import ConfigError
    from meddino.core.files import atomic_write, write_text
    from meddino.core.html_charts import png
    from meddino.core.logging import get_logger
    from meddino_evaluation.classification.images import read_slices
    from meddino_evaluation.visualization.patch_similarity import (
        patch_map,
        pca_picture,
        similarity_page,
        similarity_picture,
    )

    stack = read_slices(arguments.image, arguments.modality)
    given: Modality = "ct" if stack.kind == "hu" else arguments.modality
    mismatch = backbone.contract.mismatch(given, f"model {backbone.name} on {Path(arguments.image).name}")
    note = f"{mismatch}; they are scaled to its range" if mismatch else ""
    if note:
        get_logger(__name__).warning("%s", note)
    number = len(stack.values) // 2 if arguments.slice is None else arguments.slice
    patches = patch_map(backbone, stack, number, arguments.size or backbone.contract.native_size_px)
    row, column = (side // 2 for side in patches.grid)
    if arguments.patch:
        match = re.fullmatch(r"(\d+),(\d+)", arguments.patch)
        if match is None:
            raise ConfigError(f"--patch {arguments.patch}: write ROW,COLUMN, for example 8,8")
        row, column = int(match[1]), int(match[2])
    pictures = {
        "pca.png": pca_picture(patches),
        "similarity.png": similarity_picture(patches, row, column),
        "image.png": patches.picture,
    }
    for name, picture in pictures.items():
        with atomic_write(arguments.out / name) as stream:
            stream.write(png(picture))
    title = f"Patch similarity: {Path(arguments.image).name}, slice {number}"
    write_text(arguments.out / "similarity.html", similarity_page(patches, title, row, column, note))
    sys.stdout.write(f"{arguments.out / 'similarity.html'}: click on a patch to see its map\n")


def _show_features(arguments: argparse.Namespace, backbone: "Backbone") -> None:
    from meddino.core import html
    from meddino.core.device import find_machine
    from meddino.core.files import atomic_write, write_text
    from meddino_evaluation.adaptation.config import FeaturesConfig
    from meddino_evaluation.adaptation.features import FeatureExtractor, make_transform
    from meddino_evaluation.classification.datasets import load_dataset_config, open_dataset
    from meddino_evaluation.visualization.embedding import embedding_figure, tsne

    config = load_dataset_config(arguments.data)
    dataset = open_dataset(config, arguments.root)
    settings = FeaturesConfig(image_size_px=arguments.size)
    transform = make_transform(backbone, settings, config)
    table = FeatureExtractor(backbone, transform, settings, arguments.out / "features", find_machine())(dataset.cases)
    places = tsne(table.vectors().double().numpy())
    names = [
        config.classes[case.label]
        if isinstance(case.label, int)
        else " + ".join(name for name, value in zip(config.classes, case.label, strict=True) if value == 1) or "none"
        for case in dataset.cases
    ]
    drawing = embedding_figure(places, names, f"{config.name}, {Path(arguments.model).name}")
    picture = html.figure_png(drawing)
    with atomic_write(arguments.out / "tsne.png") as stream:
        stream.write(picture)
    section = html.Section(
        "t-SNE", html.figure(picture, "features coloured by label; distances between far groups mean nothing")
    )
    write_text(arguments.out / "tsne.html", html.page(f"Features of {config.title}", f"{len(names)} cases", [section]))
    sys.stdout.write(f"{arguments.out / 'tsne.html'}\n")
