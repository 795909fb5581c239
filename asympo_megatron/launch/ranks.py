"""torchrun for `asympo train`: a batch system's signals reach the ranks, and their exit code reaches the caller.

    python -m asympo_megatron.launch.ranks --nproc-per-node=8 [options of torchrun] \\
        -m asympo_megatron.cli.main train CONFIG

torchrun by itself kills its ranks 30 s after a SIGTERM, dies of a SIGUSR1, and exits with 1 whatever they exited with.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from asympo_megatron.errors import EXIT_REQUEUE

_RANK_MODULE = "asympo_megatron.cli.main"


class RankLauncher:
    """One torchrun agent, in a thread of its own: outside the main thread it leaves the signals to us."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._asked = False
        self._code = 1  # should the thread die of an exception, which Python then prints

    def run(self) -> int:
        """Start the ranks and wait for their end; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: self._ask())
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)  # warns about that
        thread = threading.Thread(target=self._launch, daemon=True)
        thread.start()
        try:
            thread.join()
        except KeyboardInterrupt:
            for rank in _ranks():
                rank.kill()
            raise
        return self._code

    def _ask(self) -> None:
        """Ask the ranks to save and stop. Before there is any, nothing needs to be saved."""
        self._asked = True
        ranks = _ranks()
        for rank in ranks:
            rank.send_signal(signal.SIGUSR1)
        if not ranks:
            os._exit(EXIT_REQUEUE)

    def _launch(self) -> None:
        try:
            torchrun.main(self._arguments)
            self._code = 0
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
            # a rank that was still loading Python dies of the signal: it had nothing to save
            if EXIT_REQUEUE in codes or (self._asked and -signal.SIGUSR1 in codes):
                self._code = EXIT_REQUEUE
            else:
                print(error, file=sys.stderr)
                self._code = max(1, codes[0])
        except SystemExit as usage:
            self._code = usage.code if isinstance(usage.code, int) else 1


def _ranks() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        try:
            if _RANK_MODULE in child.cmdline():
                found.append(child)
        except psutil.Error:  # it has just ended
            continue
    return found


def main() -> int:
    try:
        return RankLauncher(sys.argv[1:]).run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
