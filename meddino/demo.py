"""`meddino-demo`: the whole way, by running the commands one after the other as a user would.

It imports no application. Each command's output goes to a log beside the results; the same demo again lets every
command go on from where it was.
"""

import argparse
import json
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.live import Live
from rich.table import Table

from meddino.core.command import EXIT_DONE, EXIT_INTERRUPTED, EXIT_RUN_AGAIN, EXIT_WRONG_INPUT, command_parser, run_command
from meddino.core.errors import MedDINOError, StoppedEarly
from meddino.core.files import locked_folder, write_text
from meddino.core.logging import console
from meddino.distributed.exit_codes import judge
from meddino.distributed.launcher import LocalProcesses, Signals, tied, watch

PHANTOM_SALT = "meddino-demo"  # the cohort is public and nobody's: a public salt gives the same bytes everywhere
POLL_S = 0.25


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    Attributes:
        name: Short name; also that of its log.
        title: What it does, for people.
        command: As typed.
    """

    name: str
    title: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Where the demo reads and writes.

    Attributes:
        out: Folder of everything it makes.
        volumes: CT volumes to pretrain on.
        dataset: nnU-Net raw dataset to segment.
        others: Further CT datasets beside it, which stay out of the corpus too.
        left_out: Names of datasets of another modality, each with its channels.
        seed: Of all commands.
        is_phantom: The embedded cohort is made first, and is what `volumes` and `dataset` name.
    """

    out: Path
    volumes: Path
    dataset: Path
    seed: int
    is_phantom: bool
    others: tuple[Path, ...] = ()
    left_out: tuple[str, ...] = ()

    def held_out(self) -> list[str]:
        """Return the options that keep what is segmented later out of the corpus."""
        folders = [dataset / name for dataset in (self.dataset, *self.others) for name in ("imagesTr", "imagesTs")]
        return [word for folder in folders if self.is_phantom or folder.exists() for word in ("--exclude", str(folder))]

    def told(self) -> list[str]:
        """Return what was chosen among several datasets, as lines for people."""
        lines = [f"{self.dataset.name} is segmented"] if self.others or self.left_out else []
        lines += [f"{dataset.name} stays out of the corpus too" for dataset in self.others]
        return [*lines, *(f"{name} is left out: no channel is CT" for name in self.left_out)]

    def probe(self) -> tuple[str, ...]:
        """Return the command that compares the export's patch tokens with pixels and with random weights."""
        model, results = f"exported={self.out / 'model'}", self.out / "results/probe"
        return ("meddino-eval", "probe", "--model", model, "--data", str(self.dataset), "--out", str(results))

    def steps(self) -> list[Step]:
        """Return the commands in order."""
        out, seed = self.out, str(self.seed)
        phantom = ("meddino-curate", "phantom", "--out", str(out / "phantom"), "--seed", seed)
        curate = ("meddino-curate", "build", str(self.volumes), "--out", str(out / "corpus"), "--config", "demo")
        salt = f"privacy.salt_file={salt_file(self.is_phantom, out)}"
        pretrain = ("meddino-pretrain", "demo", "--corpus", str(out / "corpus"), "--out", str(out / "run"), f"seed={seed}")
        settings = "demo" if self.is_phantom else "demo_real"
        segment = ("meddino-eval", "segment", "--config", settings, "--data", str(self.dataset))
        return [
            *([Step("phantom", "make the phantom cohort", phantom)] if self.is_phantom else []),
            Step("curate", "curate volumes into a corpus", (*curate, *self.held_out(), salt)),
            Step("pretrain", "pretrain in three stages", pretrain),
            Step("export", "export the teacher", ("meddino-export", str(out / "run"), "--out", str(out / "model"))),
            # Of real data two labelled patients are enough for the demo, and too few to select on.
            *([Step("probe", "probe the patch tokens", self.probe())] if self.is_phantom else []),
            Step(
                "segment",
                "segment with the export",
                (*segment, "--model", str(out / "model"), "--out", str(out / "results/exported")),
            ),
            Step(
                "random",
                "segment with random weights",
                (*segment, "--model", f"random:{out / 'model'}", "--out", str(out / "results/random")),
            ),
        ]


def salt_file(is_phantom: bool, out: Path) -> Path:
    """Return the file with what salts the ids of patients and volumes.

    Real data get one salt a user, outside of everything the demo writes: two runs then give the same bytes, and nobody
    else can turn an id back into a name.
    """
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return out / "phantom.salt" if is_phantom else config_home / "meddino" / "demo.salt"


def write_salt(path: Path, is_phantom: bool) -> None:
    """Make the salt where there is none yet; a private one is drawn at random and readable by its owner only."""
    if path.exists():
        return
    write_text(path, (PHANTOM_SALT if is_phantom else secrets.token_hex(32)) + "\n")
    path.chmod(0o600)


def make_plan(data: Path | None, out: Path, seed: int) -> Plan:
    """Decide what the demo reads.

    Args:
        data: None for the embedded cohort; else a folder with `ct/` (or volumes anywhere in it) and, in it or in
            `segmentation/`, an nnU-Net raw dataset.
        out: Folder for everything.
        seed: Of all commands.

    Raises:
        MedDINOError: The folder or a dataset in it is missing.
    """
    if data is None:
        return Plan(out, out / "phantom" / "ct", out / "phantom" / "segmentation" / "Dataset900_Phantom", seed, is_phantom=True)
    if not data.is_dir():
        raise MedDINOError(f"--data {data}: no such folder")
    datasets = sorted(
        file.parent for pattern in ("*/dataset.json", "segmentation/*/dataset.json") for file in data.glob(pattern)
    )
    if not datasets:
        raise MedDINOError(
            f"--data {data}: no nnU-Net raw dataset (a folder with dataset.json, imagesTr, labelsTr) in it or in its "
            "segmentation/ folder; the last step needs one"
        )
    volumes = data / "ct" if (data / "ct").is_dir() else data
    channels = {dataset: _channels(dataset) for dataset in datasets}
    # nnU-Net's own rule: CT is what a channel calls so. Where none does, the names say nothing.
    of_ct = [dataset for dataset in datasets if "ct" in map(str.lower, channels[dataset])] or datasets
    left_out = tuple(f"{dataset.name} ({', '.join(channels[dataset])})" for dataset in datasets if dataset not in of_ct)
    # The last one: where a folder holds several, later numbers are the users' own in nnU-Net's numbering.
    return Plan(out, volumes, of_ct[-1], seed, is_phantom=False, others=tuple(of_ct[:-1]), left_out=left_out)


def _channels(dataset: Path) -> list[str]:
    file = dataset / "dataset.json"
    try:
        return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))["channel_names"].values()]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise MedDINOError(f"{file}: no object with 'channel_names' in it ({type(error).__name__})") from error


def run_steps(plan: Plan) -> dict[str, float]:
    """Run all commands.

    Returns:
        Seconds each took in this run, by the step's name.

    A signal goes on to the command that runs, which saves what it can; what it ends with, the demo ends with.

    Raises:
        MedDINOError: A command failed; in its words, or with the last lines of its log.
        StoppedEarly: A signal came, or a command wants to be run again.
    """
    (plan.out / "logs").mkdir(parents=True, exist_ok=True)
    write_salt(salt_file(plan.is_phantom, plan.out), plan.is_phantom)
    for line in plan.told():
        console.print(line, soft_wrap=True)
    seconds: dict[str, float] = {}
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        for number, step in enumerate(plan.steps(), start=1):
            log = plan.out / "logs" / f"{number}-{step.name}.log"
            console.print(f"[bold]{number}. {step.title}[/bold]  [dim]{shlex.join(step.command)}[/dim]", soft_wrap=True)
            seconds[step.name] = _run(step, log, live)
            console.print(f"   done in {seconds[step.name]:.1f} s")
    return seconds


def _run(step: Step, log: Path, live: Live) -> float:
    started = time.monotonic()
    # The command of this environment, whatever PATH says.
    program = Path(sys.executable).with_name(step.command[0])
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(step.command)}\n".encode())
    signals = Signals()
    with signals.noted():
        process = LocalProcesses(tied([str(program), *step.command[1:]]), [os.environ], [log])
        endings, _ = watch(
            process, signals, reason_to_end=lambda: live.update(_status(log, time.monotonic() - started)), poll_s=POLL_S
        )
    live.update("")
    code = judge(endings, process.exit_code() or EXIT_DONE).exit_code
    if code not in (EXIT_DONE, EXIT_RUN_AGAIN, EXIT_INTERRUPTED):
        raise _failure(step, code, log)
    if code == EXIT_INTERRUPTED or signal.SIGINT in signals.seen:
        raise KeyboardInterrupt
    if signals.seen:
        raise StoppedEarly(f"stopped by {signal.Signals(min(signals.seen)).name}; the same command again goes on")
    if code == EXIT_RUN_AGAIN:
        raise StoppedEarly(f"'{step.title}' was stopped ({endings[0].how}), see {log}; the same command again goes on")
    return round(time.monotonic() - started, 1)


def _failure(step: Step, code: int, log: Path) -> MedDINOError:
    """Return why a command has failed: in its own words where it has said so in a line, else with the end of its log."""
    lines = log.read_text(errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith(step.command[0]) and ": error: " in line), None)
    if code == EXIT_WRONG_INPUT and said:
        return MedDINOError(f"'{step.title}': {said.partition(': error: ')[2]} (log: {log})")
    tail = "\n".join(lines[-15:])
    return MedDINOError(f"'{step.title}' ended with exit code {code}; the end of {log}:\n{tail}")


def _status(log: Path, seconds: float) -> Table:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2000))
        lines = stream.read().decode(errors="replace").splitlines()
    row = Table.grid(padding=(0, 1))
    row.add_row(f"   {seconds:5.0f} s", f"[dim]{lines[-1][:150] if lines else ''}[/dim]")
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `meddino-demo`."""
    parser = command_parser(
        "meddino-demo",
        "Curate, pretrain in three stages, export and segment: on an embedded phantom cohort, or on your own CT.",
        "meddino-demo --out demo_output\n  meddino-demo --data my_scans --out demo_output",
    )
    parser.add_argument("--data", type=Path, help="folder with ct/ and segmentation/<nnU-Net dataset>/; the phantom if absent")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for everything the demo makes")
    parser.add_argument("--seed", type=int, default=0, help="of all commands")
    return run_command(parser, argv, _handle)


def _handle(arguments: argparse.Namespace) -> None:
    from meddino.demo_report import print_table, read_summary, write_report  # imports torch: not before --help

    plan = make_plan(arguments.data, arguments.out, arguments.seed)
    with locked_folder(plan.out):
        seconds = run_steps(plan)
        summary = read_summary(plan.out, seconds)
        write_report(plan.out, summary, [shlex.join(step.command) for step in plan.steps()])
    print_table(summary)
    console.print(f"\nreport: {plan.out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
