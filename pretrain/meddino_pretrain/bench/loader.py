"""`meddino-pretrain bench loader`: how many slices a second one core decodes, crops and normalises."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from meddino.core.device import Machine, find_machine
from meddino.core.errors import ConfigError
from meddino.data.corpus import Corpus
from meddino.data.intensity import CTIntensity, Modality
from meddino.data.sample import decode_slice, encode_slice
from meddino_pretrain.bench import method_config
from meddino_pretrain.data.batches import to_model_input
from meddino_pretrain.data.config import LoaderConfig
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.data.loader import Loader, SampleMaker, SliceSource
from meddino_pretrain.data.sampler import BatchShare, SampleOrder
from meddino_pretrain.methods import method_class
from meddino_pretrain.methods.config import MethodConfig


@dataclass(frozen=True)
class SyntheticSlices:
    """Slices made up in memory and stored as a corpus stores them: a body with 20 HU of noise in noisy air.

    Attributes:
        count: Number of slices.
        side_px: Rows and columns of each.
    """

    count: int = 16
    side_px: int = 512
    root: Path = Path("(synthetic slices)")

    @cached_property
    def spacing_mm(self) -> NDArray[np.float64]:
        """[slices, 2]: spacing (y, x) of every slice."""
        return np.full((self.count, 2), 0.8)

    @cached_property
    def _stored(self) -> list[bytes]:
        rng = np.random.default_rng(0)
        y, x = np.mgrid[-1 : 1 : self.side_px * 1j, -1 : 1 : self.side_px * 1j]
        body = np.where((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1, 40.0, -1000.0)
        return [encode_slice((body + rng.normal(0, 20, body.shape)).astype(np.int16)) for _ in range(self.count)]

    def __len__(self) -> int:
        """Return the number of slices."""
        return self.count

    def key(self, index: int) -> str:
        """Return the key of a slice."""
        return f"synthetic-{index:04d}"

    def modality(self, index: int) -> Modality:
        """Return what a slice's values mean."""
        return "ct"

    def value_range(self, index: int) -> None:
        """Return no range: CT's unit says it."""

    def read(self, index: int) -> NDArray[np.int16]:
        """Decode a slice."""
        return decode_slice(self._stored[index], "blosc2", self.side_px, self.side_px, self.key(index))


def bench_loader(
    corpus: SliceSource,
    method: MethodConfig,
    *,
    patch_size: int = 16,
    batch: int = 16,
    steps: int = 4,
    workers: int = 0,
) -> dict[str, float | int | str]:
    """Measure the way from stored slices to model input, stage by stage.

    Args:
        corpus: Where slices are read.
        method: Sizes and number of views.
        patch_size: Side of a patch [px].
        batch: Slices in a batch.
        steps: Batches measured; the fastest counts, for others on the machine only ever slow it down.
        workers: Processes of the loader in the last measurement.

    Returns:
        For one core: slices decoded a second, decoded and cropped, and taken through the intensity work on the device;
        and slices a second that the loader delivers with its workers. Beside them what was measured.
    """
    machine, kind = find_machine(), method_class(method)
    spec = kind.views(method)
    spec.check_sides(patch_size, "bench loader")
    maker = SampleMaker(
        corpus=corpus,
        spec=spec,
        collate=partial(kind.collate, method, patch_size),
        intensities=Intensities((CTIntensity(),)),
        order=SampleOrder(0, len(corpus), batch),
        share=BatchShare(batch),
    )
    loader = Loader(maker, LoaderConfig(workers=workers), 0, max(2, steps), machine.is_accelerator)
    decode_s, crop_s, device_s = _seconds_on_one_core(maker, steps, machine)
    waits = [batch_read.data_wait_s for batch_read in loader]
    return {
        "slices_per_s_decode": round(batch / decode_s, 1),
        "slices_per_s_decode_and_crop": round(batch / crop_s, 1),
        "slices_per_s_intensity": round(batch / device_s, 1),
        # Without the first batch: starting the workers is no property of the loader's speed.
        "slices_per_s_loader": round(batch * (len(waits) - 1) / sum(waits[1:]), 1),
        "workers": workers,
        "batch": batch,
        "rows": int(corpus.read(0).shape[0]),
        "cols": int(corpus.read(0).shape[1]),
        "crops_of_a_slice": sum(view.count for view in spec.views.values()),
        "device": str(machine.device),
    }


def run(arguments: argparse.Namespace) -> None:
    """Measure the loader and print the figures; see `bench.commands.loader`."""
    if min(arguments.batch, arguments.steps, arguments.slice_size, arguments.patch_size) < 1 or arguments.workers < 0:
        raise ConfigError(
            "bench loader needs --batch, --steps, --slice-size and --patch-size of 1 or more, --workers of 0 or more"
        )
    source = Corpus(arguments.corpus) if arguments.corpus else SyntheticSlices(side_px=arguments.slice_size)
    result = bench_loader(
        source,
        method_config(arguments),
        patch_size=arguments.patch_size,
        batch=arguments.batch,
        steps=arguments.steps,
        workers=arguments.workers,
    )
    sys.stdout.write(json.dumps(result) + "\n")


def _seconds_on_one_core(maker: SampleMaker, steps: int, machine: Machine) -> tuple[float, float, float]:
    """Return the seconds for a batch: decoded; decoded and cropped; taken through the intensity work on the device."""
    maker.corpus.read(0)  # the first read opens files and warms the codec up
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        decode_s = _fastest(lambda step: [maker.corpus.read(index) for index in maker.order.slices_for_step(step)], steps)
        crop_s = _fastest(lambda step: maker.make(step, 0), steps)
        raw = maker.make(0, 0)

        def on_device(step: int) -> None:
            list(to_model_input(raw, maker.spec, machine, maker.intensities).views.values())
            machine.synchronize()

        return decode_s, crop_s, _fastest(on_device, steps)
    finally:
        torch.set_num_threads(threads)


def _fastest(work: Callable[[int], object], steps: int) -> float:
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        work(step)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
