"""A labelled probe while training: `meddino-eval probe` on the backbone that would be exported, in a process of its own.

Nothing of it reaches training: the process draws from no generator of this one, sees the CPU alone unless told otherwise, and
whatever becomes of it is a number less and a line in the log. Its numbers choose nothing.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
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
from meddino_pretrain.monitoring.config import MonitoringConfig

FOLDER = "labelled_probe"
PREFIX = "labelled/"
MODEL, PIXELS = "teacher", "pixels"
logger = get_logger(__name__)


def check_probe_data(corpus: Corpus, config: MonitoringConfig) -> None:
    """Refuse labelled data of which it is not known that its patients are not learnt from.

    Raises:
        ConfigError: It is missing, the corpus was not audited against it, or shares something with it.
    """
    data = config.probe_data
    if data is None:
        return
    if not data.is_dir():
        raise ConfigError(f"monitoring.probe_data {data}: no such folder")
    name = config.probe_audit or data.resolve().name
    for part in corpus.parts:
        entry = next((each for each in part.info.get("audit", []) if each["name"] == name), None)
        again = f"meddino-curate audit {part.location} --against {data} --name {name}"
        if entry is None or not entry["volumes"]:
            raise ConfigError(
                f"monitoring.probe_data {data}: corpus {part.location} has no audit called '{name}', so its patients may be "
                f"learnt from; before that: {again} (or name another audit with monitoring.probe_audit)"
            )
        if entry["overlaps"] or entry.get("unread"):
            raise ConfigError(
                f"monitoring.probe_data {data}: corpus {part.location} is not known to be without its patients: "
                f"{audit_text(entry)}; build the corpus again with --exclude {data}"
            )
        if not entry.get("compared", {}).get("patient"):
            logger.warning("monitoring.probe_data %s: patients could not be compared with the corpus's, only scans", data)


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

    def measure(self, step: int) -> dict[str, float]:
        """Return macro-F1 of the backbone and of pixels alone. Every process calls it; only the first one's has numbers.

        Returns:
            Numbers whose names begin with "labelled/"; empty where no data is given, or where it went wrong, which is logged.
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
        out.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).with_name("meddino-eval")), "probe", "--no-random", "--model", f"{MODEL}={weights}"]
        command += ["--data", str(self.config.probe_data), "--out", str(out), *self.config.probe_settings]
        with (out / "log.txt").open("wb") as log:
            # A session of its own: a signal to this run's group ends the run after its step, and no probe before its number.
            subprocess.run(
                command,
                check=True,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=_environment(),
                timeout=self.config.probe_timeout_s,
                start_new_session=True,
            )
        return out

    def _read(self, out: Path) -> dict[str, float]:
        found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        seen = found["leakage"][MODEL]["test_cases_in_pretraining"]
        if seen:
            raise ConfigError(f"{len(seen)} of its test cases are in the corpus, {seen[0]} for one")
        means = {name: found["models"][model]["chosen"]["macro_f1"]["mean"] for name, model in NAMES.items()}
        return {f"{PREFIX}{name}": float(value) for name, value in means.items() if value is not None}


NAMES = {"macro_f1": MODEL, "macro_f1_pixels": PIXELS}
"""Number in a record -> the features whose readout it is."""


def _environment() -> dict[str, str]:
    """Return this process's environment without what makes it one of several."""
    mine = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in mine and not name.startswith("TORCHELASTIC_")}
