"""The growth table and the start-up time, at a size of seconds."""

import resource

import pytest

from tests.benchmarks.bench_growth import STAGE, as_markdown, bench_step, processes_row, startup_s

TINY = {"batch": 2, "global-size": 32, "local-size": 16, "locals": 1, "prototypes": 64}


def test_as_markdown__ratios_to_the_first():
    lines = as_markdown([("base", 0.5, 100.0), ("more", 1.5, 140.0)]).splitlines()
    assert lines[3] == "| more | 1.50 | 3.0 | 140 | +40 |"


@pytest.mark.slow
def test_rows__of_one_step_and_of_two_processes(make_corpus_for_bench, tmp_path):
    result = bench_step("vitnano8", 1, 1, TINY)
    assert result["batch"] == 2 and result["peak_mib"] > 100
    name, seconds, mib = processes_row("vitnano8", 1, make_corpus_for_bench, tmp_path / "run", 2, "ddp")
    assert name.startswith("2 processes") and seconds > 0 and mib > 100
    assert (tmp_path / "run" / STAGE / "metrics.jsonl").is_file()


@pytest.mark.slow
def test_startup__under_15_seconds_of_processor_time(make_corpus_for_bench, tmp_path):
    # Processor time: a test shares its cores, and the bound is for a machine that does not.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    startup_s(make_corpus_for_bench, tmp_path / "run")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 15


@pytest.fixture(scope="module")
def make_corpus_for_bench(tmp_path_factory):
    """The folder of a corpus of 24 slices of 128 px."""
    from tests.pretrain.conftest import disc_slice, write_corpus

    return write_corpus(tmp_path_factory.mktemp("bench") / "corpus", [disc_slice(number, 128, 128) for number in range(24)])
