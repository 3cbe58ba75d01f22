"""`check-gpu` where there is no GPU: what applies is looked at, the rest is said to be left out."""

import pytest
from meddino_pretrain.bench import check_gpu
from meddino_pretrain.bench.check_gpu import Verdict, losses_of, verdicts
from meddino_pretrain.cli import main

from meddino.core.device import find_machine


@pytest.mark.distributed
@pytest.mark.slow
def test_verdicts__on_a_cpu():
    found = list(verdicts(find_machine("cpu")))
    assert [each.kind for each in found if each.kind != "left out"] == ["ok"] * 6, found
    assert {each.what.split()[0] for each in found if each.kind == "left out"} >= {"device", "flash", "compiled", "speed"}


def test_resumed__continues_to_the_bit():
    assert check_gpu._resumed(find_machine("cpu", "fp32"), 0.0).kind == "ok"


def test_compared__a_loss_that_is_far_away_is_wrong():
    exact = losses_of(find_machine("cpu", "fp32"))
    assert check_gpu._compared("it", exact, exact, 0.0).kind == "ok"
    assert check_gpu._compared("it", [exact[0], exact[1] * 1.1], exact, 0.01).kind == "wrong"


def test_command__a_wrong_verdict_is_its_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(check_gpu, "verdicts", lambda machine: iter([Verdict("ok", "one", "1"), Verdict("wrong", "two", "2")]))
    assert main(["check-gpu", "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert said.out.splitlines() == ["ok        one: 1", "wrong     two: 2"] and "1 of the lines above" in said.err
