"""`meddino-eval predict --box`: masks of a picture or volume of one's own, from boxes and points."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meddino.core.config import load_config
from meddino.core.device import Machine, find_machine, use_cpu_threads
from meddino.core.errors import CheckpointError, ConfigError
from meddino.core.files import atomic_write
from meddino.volumes.pictures import is_picture
from meddino.volumes.read import read_volume
from meddino.volumes.writing import write_label_map
from meddino_evaluation.adaptation.fitting import load_state
from meddino_evaluation.data.inputs import Input, refuse_overwriting, stem
from meddino_evaluation.data.labels import LabelScheme
from meddino_evaluation.data.pictures import pixel_grid, read_planes, write_mask_picture
from meddino_evaluation.data.prepare import GridRule, PreparedCase, prepare_volume
from meddino_evaluation.prompts.config import BUNDLE_FILE, PromptConfig
from meddino_evaluation.prompts.drawing import Prompt
from meddino_evaluation.prompts.masks import encoded, predict_prompts
from meddino_evaluation.prompts.network import PromptNetwork
from meddino_evaluation.segmentation.networks.encoders import load_encoder, widened
from meddino_evaluation.segmentation.overlay import mask_overlay_png
from meddino_evaluation.segmentation.training.fitting import weights_path
from meddino_evaluation.segmentation.training.map_cache import MapCache

_NUMBERS = re.compile(r"(?:(\d+):)?([-\d.]+(?:,[-\d.]+)*)")


@dataclass(frozen=True)
class PromptBundle:
    """A trained decoder, ready for new pictures.

    Attributes:
        network: On the machine.
        config: It was trained with.
        content: Of prompts.json.
        machine: Device and arithmetic.
    """

    network: PromptNetwork
    config: PromptConfig
    content: dict[str, Any]
    machine: Machine


def run_boxes(arguments: argparse.Namespace, fold: int, seed: int) -> str:
    """Segment one input from the boxes and points of the command line; return what was written, in words.

    Raises:
        ConfigError: The prompts are missing, malformed, or lie outside the picture; a result would take the input's place.
    """
    bundle = load_prompts(arguments.results, fold, seed, arguments.model)
    if len(arguments.input) != 1 or arguments.input[0].is_dir():
        raise ConfigError("--box and --point are for one picture or volume: give one file as --input")
    (path,) = arguments.input
    flat = is_picture(path.name)
    out = arguments.out / f"{stem(path)}{'.png' if flat else '.nii.gz'}"
    overlay = arguments.out / f"{stem(path)}_overlay.png"
    refuse_overwriting([Input(stem(path), (path,))], [out, overlay])
    case = _opened(bundle, path)
    prompts = [
        (z, Prompt(box=(a, b, c, d)))
        for z, (a, b, c, d) in (parse_prompt(one, 4, "--box", case.num_slices) for one in arguments.box)
    ]
    prompts += [
        (z, Prompt(points=((x, y),)))
        for z, (x, y) in (parse_prompt(one, 2, "--point", case.num_slices) for one in arguments.point)
    ]
    if not prompts:
        raise ConfigError(
            f"{arguments.results} was trained for prompts: give --box x0,y0,x1,y1 or --point x,y (slice:... in a volume)"
        )
    labels = predict_prompted(bundle, case, prompts)
    if flat:
        write_mask_picture(out, labels[0])
    else:
        write_label_map(out, labels, case.source)
    names = tuple(f"prompt {number}" for number in range(1, len(prompts) + 1))
    scheme = LabelScheme(names, tuple((number,) for number in range(1, len(prompts) + 1)))
    with atomic_write(overlay) as stream:
        stream.write(mask_overlay_png(case, labels, scheme))
    found = ", ".join(f"{int((labels == number).sum())}" for number in range(1, len(prompts) + 1))
    return f"{out}: pixels of each prompt: {found}\npicture: {overlay}\n"


def load_prompts(results: Path, fold: int, seed: int, model: str | None = None) -> PromptBundle:
    """Load a decoder that `meddino-eval prompt` has trained.

    Raises:
        ConfigError: The folder is no finished run, or has no such fold or seed.
        CheckpointError: A file is damaged, or the encoder is another one.
    """
    path = results / BUNDLE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{results} is no finished run of `meddino-eval prompt`: {BUNDLE_FILE} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    config = load_config(PromptConfig, [results / "config.yaml"])
    if fold not in content["folds"] or seed not in config.seeds:
        raise ConfigError(f"{results} has folds {content['folds']} and seeds {list(config.seeds)}, not {fold} and {seed}")
    use_cpu_threads()
    machine = find_machine(config.device, config.precision)
    source = load_encoder(model or content["model"], config.random_seed)
    source = replace(source, contract=replace(source.contract, given=content["modality"]))
    if source.model_hash != content["model_hash"]:
        raise CheckpointError(f"model {source.name} has other weights than the one {results} was trained with")
    source = widened(source, content["input_channels"])
    decoder = config.decoder.model_copy(update={"weights": None})  # they are in what was trained
    network = PromptNetwork(source.backbone, source.contract, config.size_px, decoder, seed)
    load_state(network, weights_path(results, fold, seed), network.own_state())
    return PromptBundle(network.to(machine.device).eval(), config, content, machine)


def predict_prompted(bundle: PromptBundle, case: PreparedCase, prompts: Sequence[tuple[int, Prompt]]) -> NDArray[np.int32]:
    """Return label values [Z, Y, X] on the source's voxels: 1 for the first prompt, 2 for the second, ...

    Args:
        bundle: The decoder.
        case: Prepared; slices and pixels of prompts are those of its source, turned to LPS.
        prompts: Slice and prompt. Where masks meet, the larger logit has the pixel.

    Raises:
        ConfigError: A prompt lies outside.
    """
    rows, cols = case.source_plane
    factors = case.plane[1] / cols, case.plane[0] / rows
    volume = np.zeros((case.num_slices, rows, cols), dtype=np.int32)
    best = np.zeros(volume.shape, dtype=np.float32)
    cache = MapCache(bundle.network, bundle.machine, bundle.config.training.map_cache_mib)
    for number, (z, prompt) in enumerate(prompts, start=1):
        check_inside(prompt, z, case)
        with torch.no_grad(), bundle.machine.autocast():
            maps = encoded(bundle.network, cache, case, z, bundle.config.data.neighbour_slices)
            logits = predict_prompts(bundle.network, maps, [prompt.scaled(*factors)], case.plane, case.source_plane)
        found = logits[0].float().cpu().numpy()
        wins = found > np.maximum(best[z], 0)
        volume[z][wins], best[z][wins] = number, found[wins]
    return case.to_source(volume)


def check_inside(prompt: Prompt, z: int, case: PreparedCase) -> None:
    """Refuse a prompt outside the picture.

    Raises:
        ConfigError: Says what the picture's borders are.
    """
    rows, cols = case.source_plane
    ends = [*([prompt.box[:2], prompt.box[2:]] if prompt.box else []), *prompt.points]
    outside = [(x, y) for x, y in ends if not (0 <= x < cols and 0 <= y < rows)]
    if outside or not 0 <= z < case.num_slices:
        raise ConfigError(
            f"{case.name}: a prompt at {outside[0] if outside else f'slice {z}'} lies outside: x is 0 to {cols - 1}, y 0 to "
            f"{rows - 1}, slice 0 to {case.num_slices - 1}"
        )
    if prompt.box and (prompt.box[0] >= prompt.box[2] or prompt.box[1] >= prompt.box[3]):
        raise ConfigError(f"{case.name}: box {','.join(f'{one:g}' for one in prompt.box)} is empty; write x0,y0,x1,y1")


def parse_prompt(text: str, count: int, option: str, slices: int) -> tuple[int, list[float]]:
    """Read `x0,y0,x1,y1`, or of a volume `slice:x0,y0,x1,y1`.

    Raises:
        ConfigError: It is neither, or does not say which of several slices.
    """
    found = _NUMBERS.fullmatch(text.replace(" ", ""))
    try:
        values = [float(one) for one in found.group(2).split(",")] if found else []
    except ValueError:
        values = []
    if found is None or len(values) != count:
        what = "x0,y0,x1,y1" if count == 4 else "x,y"
        raise ConfigError(f"{option} {text}: write {what}, in a volume slice:{what}")
    if found.group(1) is None and slices > 1:
        raise ConfigError(f"{option} {text}: the volume has {slices} slices; write which, from 0, as slice:{text}")
    return int(found.group(1) or 0), values


def _opened(bundle: PromptBundle, path: Path) -> PreparedCase:
    content, rule = bundle.content, GridRule(size_px=bundle.config.size_px)
    if bool(content["flat"]) != is_picture(path.name):
        wanted = "a picture" if content["flat"] else "a volume"
        raise ConfigError(f"--input {path}: the network was trained on {wanted}, and this is none")
    if not path.is_file():
        raise ConfigError(f"--input {path}: no such file")
    if content["flat"]:
        planes = read_planes(path, content["channels"])
        return prepare_volume(stem(path), planes, pixel_grid(*planes.shape[2:]), rule, modality=content["modality"])
    if content["channels"] > 1:
        raise ConfigError(
            f"{bundle.content['model']}: --box reads one file, and the network has {content['channels']} channels"
        )
    volume = read_volume(path)
    return prepare_volume(stem(path), volume.voxels[None], volume.geometry, rule, modality=content["modality"])
