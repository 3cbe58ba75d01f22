"""What is handed to SLURM, seen through --dry-run: no SLURM is needed for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from meddino_slurm.cli import main
from meddino_slurm.config import SiteConfig
from meddino_slurm.submission import job_id_of
from meddino_slurm.submission import submit as submit_works
from meddino_slurm.work import make_work

from meddino.core.config import load_config
from meddino.core.errors import MedDINOError
from tests.slurm.conftest import submit


def directives(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    return {key: value.strip("'") for key, value in found}


def srun_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("srun ")]


@pytest.fixture
def no_slurm(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))


def test_dry_run__sbatch_script_of_four_nodes_of_eight(no_slurm, tmp_path):
    out = tmp_path / "run"
    text = submit("--cluster", "four_nodes_of_eight", "--dry-run", "pretrain", "ct3m_vitb", "--corpus", "c", "--out", out)
    assert directives(text) == {
        "job-name": "pretrain run",
        "partition": "gpu",
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "mem": "0G",
        "time": "1440",
        "signal": "USR2@180",
        "requeue": "",
        "open-mode": "append",
        "output": f"{out}.slurm/%j.supervisor.log",
    }
    main, beats = srun_lines(text)
    assert "--nodes=4 --ntasks=32 --ntasks-per-node=8 --cpus-per-task=12" in main
    assert main.endswith(f"meddino-pretrain ct3m_vitb --corpus c --out {out}")
    assert "--overlap" in beats
    assert not Path(f"{out}.slurm").exists()


def test_dry_run__shows_every_variable(no_slurm, tmp_path):
    text = submit(
        "--cluster", "four_nodes_of_eight", "--dry-run", "pretrain", "smoke", "--corpus", "c", "--out", tmp_path / "r"
    )
    for line in (
        "OMP_NUM_THREADS=1",
        "NCCL_SOCKET_IFNAME=ib0",
        "MASTER_ADDR=<first machine of the job>",
        "MASTER_PORT=<a port that is free on it>",
        "SLURM_STEP_NUM_TASKS=32",
        "SLURM_PROCID=<rank, from srun>",
        "SLURM_LOCALID=<rank on its machine, from srun>",
    ):
        assert line in text.splitlines()


def test_dry_run__what_a_real_job_gets_is_what_was_shown(site, standin, tmp_path):
    """The variables of a process, those the shell has anyway left out."""
    words = ("--cluster", site(tasks=2, **standin), "--executor", "local")
    out = tmp_path / "run"
    shown = submit(*words, "--dry-run", "pretrain", "environment", "--out", out)
    names = set(re.findall(r"^([A-Z_]+)=", shown, re.MULTILINE))
    submit("--cluster", site(tasks=2, **standin), "--executor", "debug", "pretrain", "environment", "--out", out)
    got = set(json.loads((out / "environment-0.json").read_text())) - set(os.environ)
    # What submitit's and Debian's own layers leave is not ours to show.
    assert names <= got | set(os.environ)
    assert got - names <= {"CUDA_VISIBLE_DEVICES", "LC_CTYPE", "_", "LINES", "COLUMNS"}


def test_dry_run__site_profile_reaches_the_script(no_slurm, site, tmp_path):
    profile = site(
        partition="gpu",
        account="proj1",
        qos="long",
        constraint="a100",
        exclude='"gpu[003,007]"',
        setup='["module load cuda/12.4", "source /project/venv/bin/activate"]',
        sbatch="{reservation: teaching}",
        container="{image: m.sif, binds: [/scratch]}",
    )
    text = submit("--cluster", profile, "--dry-run", "eval", "segment", "--model", "m", "--data", "d", "--out", tmp_path / "r")
    found = directives(text)
    wanted = {"account": "proj1", "qos": "long", "constraint": "a100", "exclude": "gpu[003,007]", "reservation": "teaching"}
    assert wanted.items() <= found.items()
    script = text[: text.index("# which starts")]
    assert script.index("module load cuda/12.4") < script.index("source /project/venv") < script.index("submitit.core._submit")
    (line,) = srun_lines(text)
    assert "apptainer exec --nv --bind /scratch m.sif meddino-eval segment --model m" in line


def test_dry_run__curation_array_and_its_merge(no_slurm, site, tmp_path):
    words = (
        "--cluster",
        site(array_parallel=4),
        "--dry-run",
        "--parts",
        8,
        "curate",
        "build",
        "scans",
        "--out",
        tmp_path / "c",
    )
    text = submit(*words)
    assert "#SBATCH --array=0-7%4" in text
    lines = srun_lines(text)
    assert [line.split("--part ")[1] for line in lines[:8]] == [f"{part}/8" for part in range(1, 9)]
    assert lines[8].endswith(f"meddino-curate build scans --out {tmp_path / 'c'}")
    assert "#SBATCH --dependency='afterok:<curate c>'" in text
    assert "#SBATCH --kill-on-invalid-dep=yes" in text


def test_dry_run__stages_chained_by_dependency(no_slurm, site, tmp_path):
    words = ("--cluster", site(), "--dry-run", "--chain-stages", "pretrain", "smoke", "--corpus", "c", "--out", tmp_path / "r")
    text = submit(*words)
    assert [line.split("--stage ")[1] for line in srun_lines(text)] == ["stage1_pretrain", "stage2_gram", "stage3_highres"]
    assert len(re.findall("--dependency='afterok:<stage", text)) == 2


def test_set__overrides_a_key_of_the_profile(no_slurm, tmp_path):
    words = ("--cluster", "dgx", "--set", "pretrain.nodes=2", "--set", "qos=short", "--dry-run")
    found = directives(submit(*words, "pretrain", "smoke", "--corpus", "c", "--out", tmp_path / "r"))
    assert (found["nodes"], found["qos"], found["gpus-per-node"]) == ("2", "short", "8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster", "dxg", "pretrain", "s", "--out", "r"], "no config file 'dxg'; give a path or one of the shipped names"),
        (["--set", "nodes=2", "pretrain", "s", "--out", "r"], "unknown key 'nodes'"),
        (["--set", "pretrain.nodes=0", "pretrain", "s", "--out", "r"], "'pretrain.nodes' is 0"),
        (["--set", "pretrain.time=soon", "pretrain", "s", "--out", "r"], "'pretrain.time' is 'soon': a time limit is minutes"),
        (["pretrain"], "'pretrain' needs its arguments"),
        (["--dry-run", "pretrain", "smoke"], "'pretrain' needs --out FOLDER"),
        (["--dry-run", "--parts", "4", "pretrain", "smoke", "--out", "r"], "--parts divides `curate build"),
        (["--dry-run", "--chain-stages", "eval", "knn", "--out", "r"], "--chain-stages belongs to 'pretrain'"),
        (["--dry-run", "--after", "nowhere", "eval", "knn", "--out", "r"], "no job was ever submitted for nowhere"),
    ],
)
def test_bad_input__one_clear_line_and_exit_2(no_slurm, tmp_path, words, message):
    answer = submit(*words, cwd=tmp_path, check=False)
    assert answer.startswith("2 meddino-submit: error: ")
    assert message in answer
    assert "\n" not in answer
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answer", "job_id"),
    [("17\n", "17"), (b"17;cluster\n", "17"), ("Welcome: read job 1 of the rules\nquota 80 %\n4711\n", "4711")],
)
def test_job_id__is_what_sbatch_says_for_programs(answer, job_id):
    assert job_id_of(answer) == job_id


@pytest.mark.parametrize("answer", ["", "Submitted batch job 17\n"])
def test_job_id__without_one_says_where_to_look(answer):
    with pytest.raises(MedDINOError, match="squeue --me"):
        job_id_of(answer)


SBATCH = '#!/bin/sh\n[ "$1" = --parsable ] && echo "site banner: job 1 of 2 rules" && echo "4711;cluster"\n'


@pytest.mark.parametrize("works", [1, 3])
def test_submit__takes_the_id_of_jobs_and_of_arrays(works, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "srun").symlink_to("sbatch")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    site = load_config(SiteConfig, ["site"], kind="slurm")
    parts = [None] if works == 1 else [f"{part}/{works}" for part in range(1, works + 1)]
    each = [make_work(site, "curate", ["build", "x", "--out", str(tmp_path / "c")], part=part) for part in parts]
    assert submit_works(site, each, "slurm", "curate c") == "4711"


@pytest.mark.parametrize(("key", "code"), [("true", 1), ("false", 0)])
def test_setup__a_line_that_fails_ends_the_job_unless_the_profile_says_otherwise(key, code, no_slurm, site, tmp_path):
    profile = site(setup='["false"]', setup_must_succeed=key)
    text = submit("--cluster", profile, "--dry-run", "curate", "build", "scans", "--out", tmp_path / "c")
    script = text[: text.index("# which starts")].splitlines()
    before_command = script[: next(number for number, line in enumerate(script) if "submitit.core._submit" in line)]
    run = subprocess.run(["/bin/bash", "-c", "\n".join(before_command) + "\ntrue"], check=False)
    assert run.returncode == code


@pytest.mark.parametrize("command", [["status", "a", "b"], ["logs", "a", "--job", "1", "--job", "2"], ["cancel"]])
def test_asking__wrong_words_are_refused(command, capsys):
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 2
    assert re.search(r"unrecognized arguments: b|--job is given twice|required: folder", capsys.readouterr().err)


def test_dry_run__any_folder_gives_a_name_that_sbatch_reads(no_slurm, tmp_path):
    out = tmp_path / "o'ut $HOME é-1.b_2"
    text = submit("--cluster", "four_nodes_of_eight", "--dry-run", "pretrain", "smoke", "--corpus", "c", "--out", out)
    assert directives(text)["job-name"] == "pretrain o_ut_HOME_é-1.b_2"


def test_dry_run__a_folder_that_sbatch_cannot_be_told_is_refused(no_slurm, tmp_path):
    words = ("--cluster", "four_nodes_of_eight", "--dry-run", "pretrain", "smoke", "--corpus", "c", "--out", tmp_path / "a\nb")
    assert "a\\\\nb' has a line break or another control character" in repr(submit(*words, check=False))
