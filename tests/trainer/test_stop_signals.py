"""Signals are noted, all ranks hear of them, and waiting for the controller ends."""

import os
import signal

import pytest

from asympo_megatron.config import load_config
from asympo_megatron.errors import PreemptedError
from asympo_megatron.protocol import FinishReply, LeaseReply
from asympo_megatron.trainer.exchange import Exchange
from asympo_megatron.trainer.preemption import Preemption, StopSignals
from asympo_megatron.trainer.sources import ControllerSource


@pytest.fixture
def handlers():
    """Whatever a test leaves installed is put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_ends_the_run_at_the_next_check(handlers, number):
    with StopSignals() as signals:
        preemption = Preemption(signals, Exchange(0, 1, 0))
        preemption.check()
        os.kill(os.getpid(), number)
        with pytest.raises(PreemptedError, match=f"{number.name} asked to stop"):
            preemption.check()
    os.kill(os.getpid(), number)  # a second one on the way out changes nothing


def test_without_a_signal_the_handlers_are_put_back(handlers):
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in handlers} == handlers


class SlowController:
    """Nothing is ever ready; the signal comes during the second poll."""

    def __init__(self, reply):
        self._reply, self.polls = reply, 0

    def lease(self, incarnation, step):
        return self._poll()

    def finish(self, incarnation, step):
        return self._poll()

    def _poll(self):
        self.polls += 1
        if self.polls == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return self._reply


@pytest.mark.parametrize(("call", "reply"), [("lease", LeaseReply(False, 3)), ("finish", FinishReply(False))])
def test_waiting_for_the_controller_ends(handlers, call, reply):
    client, exchange = SlowController(reply), Exchange(0, 1, 0)
    with StopSignals() as signals:
        source = ControllerSource(load_config("quickstart"), client, exchange, Preemption(signals, exchange))
        with pytest.raises(PreemptedError):
            getattr(source, call)(3)
    assert client.polls == 2
