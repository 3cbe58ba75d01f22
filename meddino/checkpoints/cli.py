"""meddino-export: a run or a training checkpoint becomes a folder that can be shared."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from meddino.checkpoints.export import FORMATS
from meddino.core.command import command_parser, run_command
from meddino.core.errors import ConfigError
from meddino.data.remote import corpus_location


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `meddino-export --help`."""
    parser = command_parser(
        "meddino-export",
        "Write a trained backbone as safetensors with its input contract and lineage, load it back and compare.",
        "meddino-export run --out model --to safetensors",
    )
    parser.add_argument(
        "source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run, a training checkpoint or an exported model"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="folder to make")
    parser.add_argument(
        "--to", default="safetensors", metavar="FORMATS", help=f"comma-separated: safetensors, {', '.join(FORMATS)}"
    )
    parser.add_argument("--stage", help="of a run: export this stage's last checkpoint (default: the last finished stage)")
    parser.add_argument("--network", choices=["teacher", "student"], default="teacher", help="which network of the trainer")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="of the weights")
    parser.add_argument("--heads", action="store_true", help="also write the DINO and iBOT heads")
    parser.add_argument("--onnx-layers", type=_numbers, default=(), metavar="N,N", help="ONNX: also patch maps of these blocks")
    parser.add_argument("--metrics", type=Path, metavar="JSON", help="file with figures for config.json and the card")
    parser.add_argument("--corpus", type=corpus_location, help="compare on slices of this corpus or URL instead of made ones")
    return run_command(parser, argv, _export)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _export(arguments: argparse.Namespace) -> None:
    from meddino.checkpoints.export.write import export_model

    out = export_model(
        arguments.source,
        arguments.out,
        [name.strip() for name in arguments.to.split(",") if name.strip()],
        stage=arguments.stage,
        role=arguments.network,
        dtype=arguments.dtype,
        heads=arguments.heads,
        onnx_layers=arguments.onnx_layers,
        metrics=_read_metrics(arguments.metrics),
        corpus=arguments.corpus,
    )
    print(out)


def _read_metrics(path: Path | None) -> dict[str, object]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--metrics {path} is no readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--metrics {path}: expected one JSON object, found {type(content).__name__}")
    return content


if __name__ == "__main__":
    sys.exit(main())
