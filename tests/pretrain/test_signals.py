"""Signals that ask a run to stop."""

import os
import signal

import pytest
from meddino_pretrain.run.signals import stop_on_signals

from meddino.core.command import STOP_SIGNALS


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_on_signals__remembers_each_and_gives_handlers_back(number):
    before = signal.getsignal(number)
    with stop_on_signals() as request:
        os.kill(os.getpid(), number)
        assert request.came()
        assert request.signal_name == number.name
    assert signal.getsignal(number) is before


def test_stop_on_signals__nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.came()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
