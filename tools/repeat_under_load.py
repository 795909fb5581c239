"""Repeats a command while every core is busy with something else; the exit code says whether it ever failed.

    python tools/repeat_under_load.py --times 20 -- python -m pytest -q tests/rollout

One loop that never rests runs beside it for each core of the machine, so that whatever depends on time is found out.
The output of a pass is shown only when it failed.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Keep so many cores busy until the block ends."""
    processes = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def repeat(command: list[str], times: int) -> int:
    """Run it so many times; returns how often it failed."""
    failed = 0
    for number in range(1, times + 1):
        started_s = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        failed += done.returncode != 0
        if done.returncode:
            print(done.stdout, flush=True)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        print(f"pass {number} of {times}, {time.monotonic() - started_s:.0f} s: {last}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--loops", type=int, default=len(os.sched_getaffinity(0)), help="by default one a core")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    with busy(arguments.loops):
        failed = repeat(arguments.command, arguments.times)
    print(f"{arguments.times - failed} of {arguments.times} passes without a failure")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
