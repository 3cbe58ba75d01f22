"""A labelled probe while training: `meddino-eval probe` on the backbone that would be exported, in a process of its own.

Nothing of it reaches training: the process draws from no generator of this one, sees the CPU alone unless told otherwise, and
whatever becomes of it is a number less and a line in the log. Its numbers choose nothing.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from meddino.checkpoints.state.names import checkpoint_name
from meddino.checkpoints.state.training_state import save_training_state
from meddino.core.errors import ConfigError, MedDINOError
from meddino.core.logging import get_logger
from meddino.data.audits import audit_text
from meddino.data.corpus import Corpus
from meddino.distributed.collectives import is_main
from meddino.distributed.launcher import tied
from meddino_pretrain.monitoring.config import MonitoringConfig

FOLDER = "labelled_probe"
PREFIX = "labelled/"
DATA = f"{PREFIX}data"
MODEL, PIXELS = "teacher", "pixels"
logger = get_logger(__name__)


def check_probe_data(corpus: Corpus, config: MonitoringConfig) -> None:
    """Refuse labelled data of which it is not known that its patients are not learnt from. Every process has to call it.

    An audit is known by its name alone, so each volume, those included that a readout is fitted on, is compared with the
    corpus once more by its content: all is read once, which takes about as long as one probe.

    Raises:
        ConfigError: It is missing, the corpus was not audited against all of it, or shares something with it.
    """
    data = config.probe_data
    if data is None:
        return
    if not data.is_dir():
        raise ConfigError(f"monitoring.probe_data {data}: no such folder")
    name = config.probe_audit or data.resolve().name
    looked_at = {
        part.location: _audited_volumes(part.info.get("audit", []), part.location, data, name) for part in corpus.parts
    }
    from meddino_pretrain.monitoring.labelled_volumes import labelled_volumes  # readers of files, which few runs need

    labelled = labelled_volumes(data, corpus)
    if labelled.seen:
        raise ConfigError(
            f"monitoring.probe_data {data}: {len(labelled.seen)} of its {labelled.count} volumes are in the corpus "
            f"{corpus.location}, {labelled.seen[0]} for one, so the audit '{name}' was of other data; build the corpus again "
            f"with --exclude {data}"
        )
    for location, count in looked_at.items():
        if count < labelled.count:
            raise ConfigError(
                f"monitoring.probe_data {data} holds {labelled.count} volumes, and the audit '{name}' of corpus {location} "
                f"looked at {count}, so it was not of all of it; before that: {_audit_command(location, data, name)}"
            )


def _audited_volumes(audits: Sequence[Mapping[str, Any]], location: str, data: Path, name: str) -> int:
    """Return how many volumes the audit of a name looked at, and refuse one that says nothing, or something bad."""
    entry = next((each for each in audits if each["name"] == name), None)
    if entry is None or not entry["volumes"]:
        raise ConfigError(
            f"monitoring.probe_data {data}: corpus {location} has no audit called '{name}', so its patients may be learnt "
            f"from; before that: {_audit_command(location, data, name)} (or name another audit with monitoring.probe_audit)"
        )
    if entry["overlaps"] or entry.get("unread"):
        raise ConfigError(
            f"monitoring.probe_data {data}: corpus {location} is not known to be without its patients: {audit_text(entry)}; "
            f"build the corpus again with --exclude {data}"
        )
    if not entry.get("compared", {}).get("patient"):
        logger.warning("monitoring.probe_data %s: patients could not be compared with the corpus's, only scans", data)
    return int(entry["volumes"]) + int(entry.get("no_ct", 0))  # label maps are among what is no CT


def _audit_command(location: str, data: Path, name: str) -> str:
    return f"meddino-curate audit {location} --against {data} --name {name}"


class LabelledProbe:
    """Probes the exported backbone on labelled patients at the steps at which features are measured."""

    def __init__(self, folder: Path, config: MonitoringConfig, backbone: nn.Module, meta: Mapping[str, Any]) -> None:
        """Take what is probed.

        Args:
            folder: The stage's folder.
            config: The data, and how it is probed.
            backbone: What is exported.
            meta: What a checkpoint of it says, without the step.
        """
        self.folder, self.config, self.backbone, self.meta = folder / FOLDER, config, backbone, meta

    def measure(self, step: int) -> dict[str, float | str]:
        """Return macro-F1 of the backbone and of pixels alone. Every process calls it; only the first one's has numbers.

        Returns:
            Numbers whose names begin with "labelled/", and under `DATA` the hash of the data they were measured on; empty where
            no data is given, or where it went wrong, which is logged.
        """
        if self.config.probe_data is None:
            return {}
        weights = self.folder / checkpoint_name(step)
        try:
            if is_main():
                shutil.rmtree(weights, ignore_errors=True)  # of a run that was killed here
            save_training_state(weights, {"backbone": self.backbone}, {**self.meta, "step": step})
            return self._read(self._probed(weights)) if is_main() else {}
        except (MedDINOError, OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError) as error:
            logger.warning("the labelled probe after step %d is left out: %s", step, " ".join(str(error).split()))
            return {}
        finally:
            if is_main():
                shutil.rmtree(weights, ignore_errors=True)

    def _probed(self, weights: Path) -> Path:
        """Run the command and return its results' folder; what it says goes to a file in it."""
        out = self.folder / f"{weights.name}-results"
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed here: its lock, and results of other data
        out.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).with_name("meddino-eval")), "probe", "--no-random", "--model", f"{MODEL}={weights}"]
        command += ["--data", str(self.config.probe_data), "--out", str(out), *self.config.probe_settings]
        log = out / "log.txt"
        try:
            with log.open("wb") as stream:
                # A session of its own: a signal to this run's group ends the run after its step, and no probe before its
                # number. It is tied to this process all the same: a kill of that leaves nobody who would read the number.
                subprocess.run(
                    tied(command),
                    check=True,
                    stdout=stream,
                    stderr=stream,
                    stdin=subprocess.DEVNULL,
                    env=_environment(),
                    timeout=self.config.probe_timeout_s,
                    start_new_session=True,
                )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            error.cmd = "meddino-eval probe"  # for the message: what was started is longer than what went wrong
            said = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), "nothing")
            raise MedDINOError(f"{str(error).rstrip('.')}; the last line of {log}: {last}") from error
        return out

    def _read(self, out: Path) -> dict[str, float | str]:
        found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        seen = found["leakage"][MODEL]["test_cases_in_pretraining"]
        if seen:
            raise ConfigError(f"{len(seen)} of its test cases are in the corpus, {seen[0]} for one")
        means = {name: found["models"][model]["chosen"]["macro_f1"]["mean"] for name, model in NAMES.items()}
        numbers: dict[str, float | str] = {f"{PREFIX}{name}": float(mean) for name, mean in means.items() if mean is not None}
        data_hash = found.get("data", {}).get("hash")
        return {**numbers, DATA: str(data_hash)} if numbers and data_hash else numbers


NAMES = {"macro_f1": MODEL, "macro_f1_pixels": PIXELS}
"""Number in a record -> the features whose readout it is."""


def _environment() -> dict[str, str]:
    """Return this process's environment without what makes it one of several."""
    mine = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in mine and not name.startswith("TORCHELASTIC_")}
