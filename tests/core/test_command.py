import errno
import os
import signal
import subprocess
import sys

import pytest

from meddino.core.command import STOP_SIGNALS, command_parser, run_command, write_line
from meddino.core.errors import StoppedEarly, VolumeError


def _run(error: BaseException | None) -> int:
    def handle(_):
        if error:
            raise error

    return run_command(command_parser("meddino-x", "Tests.", "meddino-x"), [], handle)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (VolumeError("ct.nii: no volume"), 2, "meddino-x: error: ct.nii: no volume\n"),
        (StoppedEarly("run it again"), 75, "meddino-x: run it again\n"),
        (KeyboardInterrupt(), 130, "meddino-x: interrupted; the same command again goes on\n"),
        (OSError(errno.ENOSPC, "No space", "/x/y"), 2, "no space left on the disk while writing /x/y"),
        (OSError(errno.EMFILE, "Too many open files"), 2, "ulimit -n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "meddino-x: error: /x/y: permission denied\n"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"/x"), 2, "meddino-x: error: /x: not a directory\n"),
    ],
)
def test_run_command__exit_codes(error, code, said, capsys):
    assert _run(error) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.EBADF, "Bad file descriptor"), OSError("no number")])
def test_run_command__a_fault_of_ours_shows_its_traceback(error):
    with pytest.raises(type(error)):
        _run(error)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_run_command__a_signal_lets_it_clean_up_and_asks_to_be_run_again(number, capsys):
    before, cleaned = signal.getsignal(number), []

    def handle(_):
        try:
            os.kill(os.getpid(), number)
        except Exception:  # noqa: BLE001 - libraries do that
            cleaned.append("swallowed")
        finally:
            cleaned.append("cleaned")

    assert run_command(command_parser("meddino-x", "Tests.", "meddino-x"), [], handle) == 75
    assert capsys.readouterr().err == f"meddino-x: stopped by {number.name}; the same command again goes on\n"
    assert cleaned == ["cleaned"]
    assert signal.getsignal(number) is before


def test_run_command__nohup_and_forks_keep_their_own_ways(capsys):
    def handle(_):
        os.kill(os.getpid(), signal.SIGHUP)
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        return 0 if os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGTERM else 1

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command(command_parser("meddino-x", "Tests.", "meddino-x"), [], handle) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().err == ""


def test_command_parser__help_ends_with_the_example():
    assert command_parser("meddino-x", "Tests.", "meddino-x --now").format_help().endswith("meddino-x --now\n")


def test_command_parser__help_shows_the_defaults_that_say_something_and_each_once():
    parser = command_parser("meddino-x", "Tests.", "meddino-x build --out b")
    command = parser.add_subparsers().add_parser("build")
    command.add_argument("--out", required=True, default="here", help="folder")
    command.add_argument("--seed", type=int, default=0, help="of all")
    command.add_argument("--size", default="small", help="side in px")
    command.add_argument("--batch", help="images (default: as in the plans)")
    command.add_argument("--side", default=16, help="default: %(default)s")
    command.add_argument("--corpus", help="what it learnt from")
    command.add_argument("--name", action="append", default=[], help="what it is called")
    command.add_argument("--fast", action="store_true", help="no checks")
    command.add_argument("overrides", nargs="*", help="config keys")
    lines = [" ".join(line.split()) for line in command.format_help().splitlines()]
    for line in (
        "--out OUT folder",
        "--seed SEED of all (default: 0)",
        "--size SIZE side in px (default: small)",
        "--batch BATCH images (default: as in the plans)",
        "--side SIDE default: 16",
        "--corpus CORPUS what it learnt from",
        "--name NAME what it is called",
        "--fast no checks",
        "overrides config keys",
    ):
        assert line in lines


def test_run_command__overrides_stand_anywhere():
    parser = command_parser("meddino-x", "Do.", "meddino-x a=1 --out b")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out")
    seen = []
    assert run_command(parser, ["a=1", "--out", "b", "c=2", "d.e=[3]"], lambda arguments: seen.append(arguments.overrides)) == 0
    assert seen == [["a=1", "c=2", "d.e=[3]"]]


def test_command_parser__an_option_given_twice_is_refused_and_a_parser_serves_again(capsys):
    parser = command_parser("prog", "does.", "prog x")
    command = parser.add_subparsers().add_parser("knn")
    command.add_argument("--model")
    command.add_argument("--draw", action="append")
    command.add_argument("overrides", nargs="*")
    assert run_command(parser, ["knn", "--model", "a", "--draw", "1", "--draw", "2"], lambda found: None) == 0
    assert run_command(parser, ["knn", "--model", "b", "x=1"], lambda found: None) == 0
    with pytest.raises(SystemExit, match="2"):
        run_command(parser, ["knn", "--model", "a", "--model", "b"], lambda found: None)
    said = capsys.readouterr().err
    assert "--model" in said and "twice" in said and "a and b" in said


def test_run_command__unknown_option_is_still_refused():
    parser = command_parser("meddino-x", "Do.", "meddino-x")
    parser.add_argument("overrides", nargs="*")
    with pytest.raises(SystemExit) as caught:
        run_command(parser, ["--what=1"], lambda arguments: None)
    assert caught.value.code == 2


PRINTS = """
from meddino.core.command import STOP_SIGNALS, command_parser, run_command, write_line

def handle(_):
    {body}

raise SystemExit(run_command(command_parser("meddino-x", "Tests.", "meddino-x"), [], handle))
"""


@pytest.mark.parametrize(
    "body",
    [
        "[write_line('x' * 1000) for _ in range(1000)]",
        "print('x' * 1000000)",
        "from meddino.core.logging import OutputConsole; [OutputConsole(width=2000).print('x' * 1000) for _ in range(1000)]",
    ],
)
def test_run_command__ends_quietly_where_its_reader_has_read_enough(body):
    line = f'{sys.executable} -c "$CODE" | head -c 10; echo ${{PIPESTATUS[0]}}'
    run = subprocess.run(
        ["bash", "-c", line], env={"CODE": PRINTS.format(body=body)}, capture_output=True, text=True, check=True
    )
    assert (run.stdout, run.stderr) == ("xxxxxxxxxx0\n", "")


def test_run_command__another_broken_pipe_is_a_fault():
    with pytest.raises(BrokenPipeError):
        _run(BrokenPipeError(errno.EPIPE, "Broken pipe"))


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize(("fault", "code"), [("None", 0), ("VolumeError('bad')", 2), ("StoppedEarly('later')", 75)])
def test_run_command__closed_and_full_streams_change_nothing(tmp_path, closed, fault, code):
    script = tmp_path / "command.py"
    script.write_text(
        "import sys\n"
        "from meddino.core.command import STOP_SIGNALS, command_parser, run_command\n"
        "from meddino.core.errors import StoppedEarly, VolumeError\n"
        "from meddino.core.logging import get_logger\n"
        "def handle(_):\n"
        f"    stream = open({str(tmp_path / 'result')!r}, 'w')\n"
        "    get_logger('x').warning('told')\n"
        "    print('a line')\n"
        "    stream.write('only this')\n"
        "    stream.close()\n"
        f"    fault = {fault}\n"
        "    if fault: raise fault\n"
        "sys.exit(run_command(command_parser('meddino-x', 'Tests.', 'meddino-x'), [], handle))\n"
    )
    found = subprocess.run(["sh", "-c", f"{sys.executable} {script} {closed}"], capture_output=True, text=True, check=False)
    assert found.returncode == code, found.stderr
    assert "Traceback" not in found.stderr
    assert (tmp_path / "result").read_text() == "only this"


def test_run_command__processes_of_one_launcher_say_a_line_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDDINO_SAID_FOLDER", str(tmp_path))
    assert [_run(VolumeError("a")), _run(VolumeError("a")), _run(VolumeError("b"))] == [2, 2, 2]
    assert capsys.readouterr().err == "meddino-x: error: a\nmeddino-x: error: b\n"


def test_run_command__a_name_that_is_no_utf8_is_one_line(capsys):
    parser = command_parser("meddino-x", "Tests.", "meddino-x")
    parser.add_argument("--out")
    with pytest.raises(SystemExit) as ended:
        run_command(parser, ["--out", os.fsdecode(b"caf\xe9")], lambda _: None)
    assert ended.value.code == 2
    assert r"caf\udce9" in capsys.readouterr().err
    assert run_command(parser, ["--out", "café"], lambda _: None) == 0


def test_run_command__a_result_may_name_a_file_whose_name_is_no_text(capsys):
    parser = command_parser("meddino-curate", "Curates.", "meddino-curate build")
    assert run_command(parser, [], lambda _: write_line(os.fsdecode(b"M\xfcller"))) == 0
    assert capsys.readouterr().out == "M\\udcfcller\n"
