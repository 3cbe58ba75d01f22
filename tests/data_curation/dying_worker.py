"""A worker that dies at one volume, as a decoder's segmentation fault would make it."""

import os
import signal

from meddino_data_curation import worker_pool
from meddino_data_curation.selection.volume_job import VolumeJob


def work(job: VolumeJob) -> str:
    if job.candidate.source_path == "c.nrrd":
        os.kill(os.getpid(), signal.SIGKILL)
    return worker_pool.curate_volume(job, worker_pool._told["config"], worker_pool._told["work"])
