"""`meddino-pretrain`: train a recipe on a corpus; the same command again goes on."""

import functools
import sys
from collections.abc import Sequence

from meddino.core.command import command_parser, run_command
from meddino_pretrain.train_command import add_arguments, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    if arguments[:1] == ["check-gpu"]:
        from meddino_pretrain.bench.commands import check_gpu

        return check_gpu(arguments[1:])
    if arguments[:1] == ["show"]:
        from meddino_pretrain.show import main as show

        return show(arguments[1:])
    parser = command_parser(
        "meddino-pretrain",
        "Train a recipe's stages on a corpus, one after the other. The same command again goes on where it stopped. "
        "`meddino-pretrain show RECIPE` prints a recipe in full; `meddino-pretrain bench step|loader` measures; "
        "`meddino-pretrain check-gpu` checks a GPU.",
        "meddino-pretrain smoke --corpus corpus --out run stages.stage1_pretrain.steps=20",
    )
    add_arguments(parser)
    return run_command(parser, arguments, functools.partial(run, arguments))


def _bench(arguments: Sequence[str]) -> int:
    from meddino_pretrain.bench.commands import loader, step

    if arguments[:1] == ["loader"]:
        return loader(arguments[1:])
    if arguments[:1] == ["step"]:
        return step(arguments[1:])
    parser = command_parser("meddino-pretrain bench", "Measure speed; one JSON line.", "meddino-pretrain bench step --help")
    parser.add_argument("what", choices=("step", "loader"), help="whole training steps, or reading and cropping slices")
    return run_command(parser, arguments[:1], lambda _: None)  # says what is allowed


if __name__ == "__main__":
    sys.exit(main())
