import sys
from pathlib import Path

import pytest
from meddino_slurm.config import SiteConfig
from meddino_slurm.plans import has_ended_well, plan_one, plan_parts, plan_stages
from meddino_slurm.record import Record
from meddino_slurm.work import make_work

from meddino.core.config import load_config
from meddino.core.errors import MedDINOError


def profile(*overrides: str) -> SiteConfig:
    return load_config(SiteConfig, ["site"], overrides, kind="slurm")


def test_make_work__runs_what_a_user_would_type(tmp_path):
    arguments = ["smoke", "seed=1", "--corpus", "c", "--out", str(tmp_path / "run")]
    work = make_work(profile(), "pretrain", arguments)
    assert Path(work.argv[0]).name == "meddino-pretrain"
    assert Path(work.argv[0]).parent == Path(sys.executable).absolute().parent
    assert list(work.argv[1:]) == arguments
    assert work.out == tmp_path / "run"
    assert work.folder == tmp_path / "run.slurm"


def test_make_work__study_is_a_kind_of_eval(tmp_path):
    work = make_work(profile(), "study", ["--out=results"])
    assert (Path(work.argv[0]).name, work.argv[1:]) == ("meddino-eval", ("study", "--out=results"))


def test_make_work__in_a_container():
    site = profile("container={image: m.sif, binds: [/scratch]}")
    work = make_work(site, "export", ["run", "--out", "model"])
    assert work.argv == ("apptainer", "exec", "--nv", "--bind", "/scratch", "m.sif", "meddino-export", "run", "--out", "model")


def test_make_work__threads_are_set_by_the_launcher_and_the_profile_has_the_last_word():
    environment = dict(make_work(profile("pretrain.threads_per_task=3"), "pretrain", ["s", "--out", "r"]).environment)
    assert environment["OMP_NUM_THREADS"] == "3"
    site = profile("environment={OMP_NUM_THREADS: '5', NCCL_SOCKET_IFNAME: ib0}")
    environment = dict(make_work(site, "pretrain", ["s", "--out", "r"]).environment)
    assert (environment["OMP_NUM_THREADS"], environment["NCCL_SOCKET_IFNAME"]) == ("5", "ib0")


def test_make_work__without_out_says_what_to_do():
    with pytest.raises(MedDINOError, match=r"'pretrain' needs --out FOLDER.*--jobs FOLDER"):
        make_work(profile(), "pretrain", ["bench", "step"])
    assert make_work(profile(), "pretrain", ["bench", "step"], jobs="bench").folder.name == "bench.slurm"


def test_plan_parts__one_job_a_part_then_a_merge(tmp_path):
    array, merge = plan_parts(profile(), "curate", ["build", "scans", "--out", str(tmp_path / "corpus")], 3)
    assert [work.argv[-2:] for work in array.works] == [("--part", "1/3"), ("--part", "2/3"), ("--part", "3/3")]
    assert merge.waits
    assert merge.works[0].arguments == ("build", "scans", "--out", str(tmp_path / "corpus"))
    assert merge.works[0].key == "curate-merge"


def test_plan_parts__again_only_what_has_not_ended_well(tmp_path):
    arguments = ["build", "scans", "--out", str(tmp_path / "corpus")]
    array, _ = plan_parts(profile(), "curate", arguments, 3)
    for number, decision in enumerate(("done", "failed", "done")):
        record = Record(array.works[number])
        record.start("5", ["n1"], "nothing yet")
        record.end(decision, 0, "")
    again, merge = plan_parts(profile(), "curate", arguments, 3)
    assert [work.key for work in again.works] == ["curate-2-of-3"]
    assert merge.waits
    record.start("6", ["n1"], "")
    assert not has_ended_well(array.works[2])  # it runs


def test_plan_parts__all_done_leaves_the_merge(tmp_path):
    arguments = ["build", "scans", "--out", str(tmp_path / "corpus")]
    for work in plan_parts(profile(), "curate", arguments, 2)[0].works:
        record = Record(work)
        record.start("5", ["n1"], "nothing yet")
        record.end("done", 0, "")
    (merge,) = plan_parts(profile(), "curate", arguments, 2)
    assert not merge.waits


@pytest.mark.parametrize(
    ("command", "arguments", "parts", "message"),
    [
        ("curate", ["build", "s", "--out", "c"], 1, "--parts is 1: give 2 or more"),
        ("curate", ["verify", "c"], 4, "--parts divides `curate build"),
        ("pretrain", ["smoke", "--out", "r"], 4, "not 'pretrain'"),
        ("curate", ["build", "s", "--out", "c", "--part", "1/4"], 4, "leave it out"),
    ],
)
def test_plan_parts__refuses(command, arguments, parts, message):
    with pytest.raises(MedDINOError, match=message):
        plan_parts(profile(), command, arguments, parts)


@pytest.mark.parametrize("study", [("compare", "--config", "study_acceptance"), ("lvm-med", "--models", "m", "--root", "data")])
def test_plan_parts__of_a_study(study, tmp_path):
    line = [*study, "--out", str(tmp_path / "study")]
    array, merge = plan_parts(profile(), "study", line, 2)
    assert [work.key for work in array.works] == ["study-1-of-2", "study-2-of-2"]
    assert array.works[0].argv[1:] == ("study", *line, "--part", "1/2")
    assert merge.works[0].argv[1:] == ("study", *line)
    assert merge.waits


def test_plan_stages__one_job_for_each_stage_of_the_recipe():
    planned = plan_stages(profile(), ["smoke", "--corpus", "c", "--out", "r"])
    stages = [each.works[0].argv[-2:] for each in planned]
    assert stages == [("--stage", name) for name in ("stage1_pretrain", "stage2_gram", "stage3_highres")]
    assert [each.waits for each in planned] == [False, True, True]
    with pytest.raises(MedDINOError, match="leave it out"):
        plan_stages(profile(), ["smoke", "--stage", "stage2_gram", "--out", "r"])


def test_plan_one__is_one_job_for_all_stages():
    (planned,) = plan_one(profile(), "pretrain", ["smoke", "--out", "r"])
    assert len(planned.works) == 1
    assert "--stage" not in planned.works[0].argv
