"""`meddino-eval weights`: which published weights can be used, which are on this machine, and what a file is."""

import argparse
import sys

from meddino.core.errors import MedDINOError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meddino-eval weights`."""
    parser.add_argument("model", nargs="?", help="check one: a name of the list, a weights file, an export, a run, NAME@FILE")


def run(arguments: argparse.Namespace) -> None:
    """Print the list, or what a model is; whatever is printed of a model has been loaded and run once."""
    sys.stdout.write(_list() if arguments.model is None else _checked(arguments.model))


def _list() -> str:
    from meddino_evaluation.backbones.catalogue import CATALOGUE
    from meddino_evaluation.backbones.weights_files import find_weights, weights_folder

    lines = [f"weights folder: {weights_folder()} ($MEDDINO_WEIGHTS names another); nothing is downloaded\n"]
    for name, entry in CATALOGUE.items():
        try:
            state = f"here: {find_weights(name, entry).name}"
        except MedDINOError:
            state = f"put {name}.safetensors or .pth there"
        lines.append(f"{name:18} {state}\n{'':18} from {entry.source}, {entry.licence}\n")
    return "".join(lines)


def _checked(spec: str) -> str:
    import torch

    from meddino_evaluation.backbones.load import load_backbone

    backbone = load_backbone(spec)
    contract, side = backbone.contract, backbone.contract.native_size_px
    with torch.no_grad():
        tokens = backbone.tokens(contract.from_ct(torch.linspace(-1000, 1000, side * side).reshape(1, 1, side, side)))
    if not torch.isfinite(tokens.cls).all() or not torch.isfinite(tokens.patches).all():
        raise MedDINOError(
            f"model {spec} loads, but gives values that are no numbers: its file is damaged, or overflowed in half precision"
        )
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    photographs = f"as for photographs, mean {contract.mean}, deviation {contract.std}"
    licence = backbone.lineage.get("licence")
    return (
        f"{spec}: {type(backbone.network).__name__}, {parameters / 1e6:.1f} million parameters, width "
        f"{backbone.embed_dim}, patch or stride {backbone.patch_size} px\ninput: {contract.own or photographs}\n"
        + (f"licence: {licence}\n" if licence else "")
        + f"one image of {side} px gave {list(tokens.patches.shape[1:])} patch tokens, all finite\nSHA-256 of its tensors: "
        f"{backbone.hash()}\nuse it: meddino-eval segment --model {spec} --data DATASET --out RESULTS\n"
    )
