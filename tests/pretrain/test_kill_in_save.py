"""A kill in the middle of a save: at every place of it, what is on disk is whole, and the run goes on to the same bytes."""

import signal
import sys
import textwrap
from pathlib import Path

import pytest
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.monitoring.metrics import TIMING, read_metrics
from meddino_pretrain.stages import run_pretraining

from meddino.checkpoints.state.verify import latest_checkpoint, verify_checkpoint
from meddino.core.config import load_config
from tests.processes import run as run_process

TINY = Path(__file__).with_name("tiny.yaml")
STAGE = "stage1_pretrain"
FAST = ["saving.every_steps=2", "saving.keep_last=1"]
# The process kills itself, as nothing can be killed from outside at a place so exact. The step-4 save is hit: step 2 stands.
CODE = """
    import os, signal
    from pathlib import Path
    import shutil
    import meddino.checkpoints.state.training_state as module
    import meddino.checkpoints.state.verify as verifying
    from meddino_pretrain.run import checkpoints as checkpointing
    from meddino_pretrain.config import PretrainConfig
    from meddino_pretrain.stages import run_pretraining
    from meddino.core.config import load_config

    def kill(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    plain_save = module.save
    saving = {"step": 0}

    def save_training_state(folder, state, meta):
        saving["step"] = meta["step"]
        return module.save_training_state(folder, state, meta)

    checkpointing.save_training_state = save_training_state
    place = PLACE
    if place == "before the tensors":
        module.save = lambda *a, **o: kill() if saving["step"] == 4 else plain_save(*a, **o)
    elif place == "between tensors and meta.json":
        plain = verifying.write_json
        verifying.write_json = lambda *a, **o: kill() if saving["step"] == 4 else plain(*a, **o)
    elif place == "half of meta.json":
        plain = verifying.write_json
        def half(path, content):
            if saving["step"] == 4:
                Path(path).write_text('{"format": "meddino-tr')
                kill()
            plain(path, content)
        verifying.write_json = half
    elif place == "after the rename, before old ones go":
        plain = checkpointing.prune_checkpoints
        checkpointing.prune_checkpoints = lambda *a, **o: kill() if saving["step"] == 4 else plain(*a, **o)
    else:  # while the old one is deleted: its meta.json is gone, its tensors are not
        plain = shutil.rmtree
        shutil.rmtree = lambda path, *a, **o: kill() if Path(path).name == "step-000000002" else plain(path, *a, **o)
    run_pretraining(load_config(PretrainConfig, [RECIPE], OVERRIDES), Path(CORPUS), Path(RUN), [STAGE])
"""
PLACES = {
    "before the tensors": 2,
    "between tensors and meta.json": 2,
    "half of meta.json": 2,
    "after the rename, before old ones go": 4,
    "while the old one is deleted": 4,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_corpus_once) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    run_pretraining(load_config(PretrainConfig, [TINY], FAST), make_corpus_once, run, [STAGE])
    return run


# One place before the checkpoint counts and one after, in every run of the tests; the others where there is more time.
ALWAYS = ("half of meta.json", "while the old one is deleted")


@pytest.mark.parametrize("place", [pytest.param(place, marks=() if place in ALWAYS else pytest.mark.slow) for place in PLACES])
def test_save__killed_anywhere_in_it(place, alone, make_corpus_once, tmp_path):
    run = tmp_path / "run"
    given = {"PLACE": place, "RECIPE": str(TINY), "OVERRIDES": FAST, "CORPUS": str(make_corpus_once), "RUN": str(run)}
    code = "\n".join(f"{name} = {value!r}" for name, value in {**given, "STAGE": STAGE}.items()) + textwrap.dedent(CODE)
    killed = run_process([sys.executable, "-c", code])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    latest = latest_checkpoint(run / STAGE / "checkpoints")
    assert latest.step == PLACES[place]
    verify_checkpoint(latest.folder)
    run_pretraining(load_config(PretrainConfig, [TINY], FAST), make_corpus_once, run, [STAGE])
    names = sorted(path.name for path in (run / STAGE / "checkpoints").iterdir())
    assert names == ["step-000000006"]  # nothing half-written or half-deleted stays behind
    ends = [folder / STAGE / "checkpoints" / "step-000000006" / "rank-00000.safetensors" for folder in (run, alone)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    traces = [
        [
            {key: value for key, value in record.items() if key != TIMING}
            for record in read_metrics(folder / STAGE / "metrics.jsonl")
        ]
        for folder in (run, alone)
    ]
    assert traces[0] == traces[1]
