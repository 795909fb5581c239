"""What the programs in benchmarks/ share: figures against goals, paired timing, peak memory, a results file.

    arguments = harness.parser(__doc__).parse_args()
    report = harness.Report("packing", save=arguments.save)
    report.at_most("packing/planning_ms", 7.1, "ms", 60.0, dp_size=64)
    return report.finish()

Every figure is one JSON line {"name", "value", "unit", "goal", "ok"} with further facts in between; the last line is
PASS or FALLS SHORT, and the exit code is 0 only on PASS. --save writes the same lines to benchmarks/results/.
"""

import argparse
import contextlib
import ctypes
import datetime
import json
import math
import multiprocessing
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIN_PAIRS = 20
"""Fewer pairs do not settle a ratio on a machine that others use too."""
_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of malloc.h."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has: --quick and --save."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a minute's worth")
    made.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.jsonl too")
    return made


class Report:
    """Figures of one benchmark: printed as they come, judged and (with ``save``) written at the end.

    Args:
        name: of the program; results go to ``benchmarks/results/NAME.jsonl``.
        save: write that file.
        results: the folder for it.
    """

    def __init__(self, name: str, *, save: bool = False, results: Path = RESULTS) -> None:
        self._file = results / f"{name}.jsonl" if save else None
        self._lines: list[dict[str, Any]] = []

    def at_most(self, name: str, value: float, unit: str, limit: float, **facts: Any) -> bool:
        """A figure whose goal is ``<= limit``; NaN misses it."""
        return self._add(name, value, unit, f"<= {limit:g}", value <= limit, facts)

    def at_least(self, name: str, value: float, unit: str, limit: float, **facts: Any) -> bool:
        """A figure whose goal is ``>= limit``; NaN misses it."""
        return self._add(name, value, unit, f">= {limit:g}", value >= limit, facts)

    def within(self, name: str, value: float, unit: str, low: float, high: float, **facts: Any) -> bool:
        """A figure whose goal is ``low <= value <= high``; NaN misses it."""
        return self._add(name, value, unit, f"{low:g} to {high:g}", low <= value <= high, facts)

    def show(self, name: str, value: float, unit: str, **facts: Any) -> bool:
        """A figure without a goal."""
        return self._add(name, value, unit, None, True, facts)

    def finish(self) -> int:
        """Print PASS or FALLS SHORT and write the file; returns the exit code. No goal at all falls short."""
        passed = any(line["goal"] for line in self._lines) and all(line["ok"] for line in self._lines)
        verdict = "PASS" if passed else "FALLS SHORT"
        print(verdict, flush=True)
        if self._file is not None:
            self._write(self._file, verdict)
        return 0 if passed else 1

    def _add(self, name: str, value: float, unit: str, goal: str | None, ok: bool, facts: dict[str, Any]) -> bool:
        shown = float(f"{value:.5g}") if math.isfinite(value) else None
        line = {"name": name, **facts, "value": shown, "unit": unit, "goal": goal, "ok": bool(ok)}
        self._lines.append(line)
        print(json.dumps(line), flush=True)
        return bool(ok)

    def _write(self, file: Path, verdict: str) -> None:
        header = {"command": command(), "commit": commit(), "hardware": hardware(), "date": _today()}
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(line) for line in (header, *self._lines, {"verdict": verdict})]
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(file)


@dataclass(frozen=True)
class Pairs:
    """Seconds of two things measured in turn."""

    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over the pairs of ours / theirs."""
        return statistics.median(self._ratios())

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between them lies half of the pairs' ratios."""
        low, _, high = statistics.quantiles(self._ratios(), n=4)
        return low, high

    def _ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True)]


def measure_pairs(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    pairs: int = MIN_PAIRS,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Pairs:
    """Run two things in turn, the first of a pair alternating, so that a drift of the machine meets both alike.

    Args:
        ours, theirs: what to measure; a return value is ignored.
        pairs: at least ``MIN_PAIRS``.
        warmup: unmeasured runs of each before.
        clock: seconds; by default CPU time of this process with all its threads.

    Raises:
        ValueError: too few pairs.
    """
    if pairs < MIN_PAIRS:
        raise ValueError(f"pairs={pairs}; a median of ratios needs at least {MIN_PAIRS}.")
    for _ in range(warmup):
        ours()
        theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            start = clock()
            (ours, theirs)[which]()
            seconds[which].append(clock() - start)
    return Pairs(tuple(seconds[0]), tuple(seconds[1]))


@dataclass(frozen=True)
class ChildRun:
    """What a child process did: its answer, CPU seconds, and resident memory above what it held before."""

    value: Any
    cpu_s: float
    extra_peak_bytes: int


def measure_in_child(prepare: Callable[..., Callable[[], Any]], *args: Any) -> ChildRun:
    """Peak memory of one call in a fresh process (Linux).

    Args:
        prepare: a function of a module (spawn must find it) that builds the inputs and returns the call to measure,
            which takes nothing and returns something that can be pickled.
        args: of ``prepare``.

    Returns:
        The call's answer and costs. The peak is the process's resident memory above its level just before the call, so
        inputs do not count.

    Raises:
        RuntimeError: the child failed; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, prepare, args))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measured child process ended with code {process.exitcode}.") from None
    process.join()
    return ChildRun(*answer)


def _child(sender: Any, prepare: Callable[..., Callable[[], Any]], args: Sequence[Any]) -> None:
    call = prepare(*args)
    with contextlib.suppress(AttributeError):  # glibc only: freed memory of the preparation must not serve the call
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, start = _memory("VmRSS"), time.process_time()
    value = call()
    sender.send((value, time.process_time() - start, _memory("VmHWM") - before))


def _memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def command() -> str:
    """How this program was called, without the folders of this machine."""
    words = [re.sub(r"(?<![\w.])/[^\s=,]*/", "", word) for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def commit() -> str:
    """Short hash of the checkout; ``+changes`` where the measured code differs from it."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    head = git("rev-parse", "--short", "HEAD")
    if head.returncode:
        return "unknown"
    measured = ("asympo_megatron", "benchmarks", ":!benchmarks/results")
    changed = git("status", "--porcelain", "--", *measured).stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")


def hardware() -> str:
    """Cores, processor, memory and accelerators in words; never a host name."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores} cores of {model[1] if model else 'an unnamed CPU'}, {memory:.0f} GiB, {_accelerators()}"


def _accelerators() -> str:
    import torch  # here: not every benchmark computes

    if not torch.cuda.is_available():
        return "no GPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def peak_above(call: Callable[[], object]) -> int:
    """Bytes of anonymous and shared memory that a call has this process hold, at the worst moment."""
    # glibc only: what is freed goes back at once, what was freed does not serve
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)
        ctypes.CDLL(None).malloc_trim(0)
    before = held_bytes()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, held_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak, held_bytes()) - before


def held_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
