"""A stage's records so far: taken in from where the last update ended, thinned to what curves and rules need."""

import itertools
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meddino_pretrain.monitoring.feature_metrics import PREFIX
from meddino_pretrain.monitoring.metrics import TIMING, complete_lines, parse_line

# More than a chart is wide; twice as many are thinned to these.
POINTS = 1000
Record = dict[str, Any]


class History:
    """metrics.jsonl of one stage, in the memory of a few thousand records however long it is.

    Attributes:
        count: Records in the file.
        totals: Sums over all of them: step_s, data_wait_s and eval_time_s [s], corrupt_samples.
        peak_memory_mib: The largest of all.
    """

    def __init__(self, path: Path, newest: int) -> None:
        """Read nothing yet.

        Args:
            path: The file; need not be there yet.
            newest: How many of the newest records are all kept.
        """
        self.path, self._newest_kept = path, newest
        self._begin()

    def _begin(self) -> None:
        self.count, self._offset = 0, 0
        self.totals = dict.fromkeys(("step_s", "data_wait_s", "eval_time_s", "corrupt_samples"), 0.0)
        self.peak_memory_mib = 0.0
        self._steps, self._probes = _Thinned(), _Thinned()
        self._newest: deque[Record] = deque(maxlen=self._newest_kept)

    @property
    def records(self) -> list[Record]:
        """The newest records, and of those before every so many-th and those with a probe; in order."""
        kept = itertools.chain(self._steps.records, self._probes.records, self._newest)
        return sorted({int(record["step"]): record for record in kept}.values(), key=lambda record: int(record["step"]))

    @property
    def every(self) -> int:
        """Of how many records one is kept."""
        return self._steps.every

    def update(self) -> None:
        """Take in what was written since the last call; a last line cut off by a kill is left for later.

        Raises:
            CheckpointError: A line is damaged.
        """
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self._offset:  # cut back to a checkpoint
            self._begin()
        if size == self._offset:
            return
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            for line in complete_lines(stream):
                self._offset += len(line)
                self._add(parse_line(line, self.path, self.count + 1))

    def _add(self, record: Record) -> None:
        record.pop("keys", None)  # a skipped step's samples: a whole batch of names
        timing: Mapping[str, Any] = record.get(TIMING) or {}
        for name in self.totals:
            self.totals[name] += float((timing if name in timing else record).get(name) or 0)
        self.peak_memory_mib = max(self.peak_memory_mib, float(timing.get("peak_memory_mib") or 0))
        self._steps.add(record)
        if has_probe(record):
            self._probes.add(record)
        self._newest.append(record)
        self.count += 1


def has_probe(record: Mapping[str, Any]) -> bool:
    """Tell whether a record holds feature metrics."""
    return any(name.startswith(PREFIX) for name in record)


class _Thinned:
    """Every so many-th of what is added, so that they never become many; the first always."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.every, self._seen = 1, 0

    def add(self, record: Record) -> None:
        if self._seen % self.every == 0:
            self.records.append(record)
        self._seen += 1
        if len(self.records) > 2 * POINTS:
            del self.records[1::2]
            self.every *= 2
