"""A backbone from what a user writes: an export, a name of the catalogue, a weights file, or random weights."""

import difflib
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from meddino.checkpoints.export import model as model_files
from meddino.core.errors import ConfigError
from meddino.models.registry import BACKBONES
from meddino.models.timm_backbone import TimmBackbone, timm_config
from meddino_evaluation.backbones.adapter import Backbone, of_model, timm_contract
from meddino_evaluation.backbones.catalogue import CATALOGUE, Entry
from meddino_evaluation.backbones.transformers_network import (
    TransformersNetwork,
    build_transformers,
    load_transformers_folder,
)
from meddino_evaluation.backbones.weights_files import find_weights, load_weights, read_weights

RANDOM = "random:"


def load_backbone(spec: str, seed: int = 0) -> Backbone:
    """Load a backbone: on the CPU, in float32, in evaluation mode, without gradients.

    Args:
        spec: One of
            - a folder made by meddino-export; a run or training checkpoint (its teacher); a file or folder of DINOv3 weights
              under official, timm or transformers names: whatever `meddino.load` reads,
            - `random:<name or folder>`: random weights of one of our backbones, of a catalogue entry, of `timm:<name>`,
              or of the architecture in an export; `random:<name or folder>@<number>` draws them with that seed,
            - a catalogue name (`dinov2_vits14`): its weights file is looked for in the weights folder,
            - `<name>@<file>`: a catalogue name, one of our backbones, or `timm:<name>`, with that weights file,
            - `hf:<folder>`: a local folder of transformers,
            - `NAME=<any of these>`: that model under a name of the user's.
        seed: Of random weights whose name says none.

    Raises:
        ConfigError: Unknown name, or weights that are not there (says which file to put where).
        CheckpointError: A file is damaged or does not fit.
    """
    name, spec = named_model(spec)
    backbone = _loaded(spec, seed).eval().requires_grad_(False)
    backbone.name, backbone.spec = name, spec
    return backbone


def named_model(text: str) -> tuple[str, str]:
    """Return the name and the model of NAME=MODEL; a model without a name is called as it is written."""
    name, equals, spec = text.partition("=")
    return (name, spec) if equals and name and spec and "/" not in name and not Path(text).exists() else (text, text)


def model_name(text: str) -> str:
    """Return a short name for tables: that of NAME=MODEL, else the model without the folders before it."""
    name, spec = named_model(text)
    prefix, colon, rest = spec.partition(":")
    return name if name != spec else f"{prefix}:{Path(rest).name}" if colon and prefix == "random" else Path(spec).name


def _loaded(spec: str, seed: int) -> Backbone:
    if spec.startswith(RANDOM):
        named = spec.removeprefix(RANDOM)
        name, _, own = named.rpartition("@")
        return _random(spec, name, int(own)) if name and own.isdecimal() else _random(spec, named, seed)
    if spec.startswith("hf:"):
        network = TransformersNetwork(spec, load_transformers_folder(Path(spec.removeprefix("hf:"))))
        return Backbone(spec, network, network.contract)
    name, at, file = spec.partition("@")
    if at and (name in CATALOGUE or name in BACKBONES or name.startswith("timm:")):
        return _from_file(spec, name, Path(file), seed)
    if spec in CATALOGUE:
        return _from_file(spec, spec, find_weights(spec, CATALOGUE[spec]), seed)
    if Path(spec).exists():
        return of_model(spec, model_files.load(spec))
    known = [*CATALOGUE, *BACKBONES]
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    if spec in BACKBONES:
        hint = f"'{spec}' is an architecture: random:{spec} runs it with fresh weights, {spec}@FILE with a file's; "
    raise ConfigError(
        f"no model '{spec}': {hint}give a folder made by meddino-export, a run, a weights file, random:<name>, "
        f"<name>@<weights file>, hf:<folder>, timm:<name>@<weights file>, or a name of `meddino-eval weights`, which says "
        "where each one is published (docs/weights.md)"
    )


def _random(spec: str, name: str, seed: int) -> Backbone:
    if (name in CATALOGUE and CATALOGUE[name].library != "meddino") or name.startswith("timm:"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _built(spec, name)[0]
    ours = CATALOGUE[name].architecture if name in CATALOGUE else name
    return of_model(spec, model_files.load(f"{RANDOM}{ours}", seed=seed))


def _from_file(spec: str, name: str, file: Path, seed: int) -> Backbone:
    if name in CATALOGUE and CATALOGUE[name].library == "meddino":
        return of_model(spec, model_files.load(file))
    if name in BACKBONES:
        backbone = of_model(spec, model_files.load(f"{RANDOM}{name}", seed=seed))
        load_weights(backbone.network, read_weights(file), ("teacher.backbone.",), str(file))
        return backbone
    # Drawing random weights that are about to be replaced would take longer than reading the file.
    backbone, entry, model = _built(spec, name)
    load_weights(model, read_weights(file), entry.prefixes, str(file))
    return backbone


def _built(spec: str, name: str) -> tuple[Backbone, Entry, nn.Module]:
    entry = CATALOGUE.get(name) or Entry(name.removeprefix("timm:"), "timm", "see timm")
    if entry.library == "timm":
        timms = TimmBackbone(timm_config(entry.architecture, **entry.arguments))
        contract = timm_contract(timms)
        if entry.takes_unit:
            contract = replace(contract, mean=(0.0,) * contract.channels, std=(1.0,) * contract.channels)
        return Backbone(spec, timms, contract), entry, timms.model
    network = TransformersNetwork(spec, build_transformers(entry.architecture, entry.arguments))
    return Backbone(spec, network, network.contract), entry, network.model
