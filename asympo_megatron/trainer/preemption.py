"""Orderly ends: on a signal of the batch system the step in progress is finished, then the run is saved and left."""

import signal
from types import FrameType
from typing import Any

from asympo_megatron.errors import PreemptedError
from asympo_megatron.trainer.exchange import Exchange

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Inside, SIGTERM and SIGUSR1 are noted instead of ending the process. For the main thread."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in _STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self.received is not None:
            return  # a second one must not change the exit code on the last metres
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


class Preemption:
    """Whether this run has been asked to stop. A signal may reach some ranks only, and each at another time."""

    def __init__(self, signals: StopSignals, exchange: Exchange) -> None:
        self._signals, self._exchange = signals, exchange

    def check(self) -> None:
        """Collective: one all-reduce of 8 bytes.

        Raises:
            PreemptedError: a rank has been signalled; on every rank.
        """
        received = self._signals.received
        if self._exchange.any(received is not None):
            raise PreemptedError(
                f"{received or 'another rank'} asked to stop: the step in progress is finished, saved and committed. "
                "The same command resumes the run."
            )
