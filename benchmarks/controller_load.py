"""The controller under load: 4,096 requests in flight, beside a bare aiohttp loop; occupancy of engines; memory.

    python benchmarks/controller_load.py [--quick] [--save]

Four scripted engines (load_engine.py), each a process, answer over HTTP after a log-normal time; prompts of 128 tokens,
answers of 512.

- Client (load_clients.py): CPU of a request through requester, fleet and engine client (slots, affinity, request ids,
  deadlines, checks of the answer, weight versions), against a loop that only posts and reads: orjson both ways, the
  same session options, a fixed number of tasks. 20 interleaved pairs; a stretch is measured while every slot is taken.
  Between the two, without a goal: the engine client alone, without slots, affinity and lag rule.
- Controller: a whole run of 200,000 requests, with journal, rewards, leases and a weight update a step, and a learner
  that takes no time. Occupancy is what the engines counted; memory is a line through the process's resident size.

--quick: 512 in flight, 12,000 requests; its memory has no goal, since a line through so short a run says nothing.
"""

import asyncio
import contextlib
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import harness
import numpy as np
import orjson
from load_clients import (
    GROUP_SIZE,
    PARAMS,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    Sample,
    bare_client,
    checking_client,
    our_client,
    stretch,
)
from scripted_run import CoinScorer, CountingTask, Learner, make_config

from asympo_megatron.rollout import build_controller
from asympo_megatron.rollout.collector import collect_rarely

ENGINES = 4
MAX_LAG_STEPS = 8
EDGE_STEPS = 12
"""At both ends of the whole run, not measured: slots fill, admission ends."""
GOAL_CLIENT, GOAL_OCCUPANCY, GOAL_BYTES = 1.3, 0.97, 64.0


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    in_flight: int
    measured: int
    """Requests of a measured stretch."""
    requests: int
    """Of the whole run."""
    pair_median_s: float
    run_median_s: float

    @property
    def slots(self) -> int:
        """Of one engine."""
        return self.in_flight // ENGINES


FULL = Size(4096, 4096, 200_000, 0.8, 6.0)
QUICK = Size(512, 1024, 12_000, 0.1, 0.75)


@contextlib.contextmanager
def engines(median_s: float, sigma: float, cap_s: float) -> Iterator[list[str]]:
    """Start the engines' processes; yields their urls."""
    program = str(Path(__file__).with_name("load_engine.py"))
    options = ["--median-s", median_s, "--sigma", sigma, "--cap-s", cap_s, "--tokens", RESPONSE_TOKENS]
    words = [sys.executable, program, *map(str, options)]
    processes = [
        subprocess.Popen([*words, "--seed", str(seed)], stdout=subprocess.PIPE, text=True) for seed in range(ENGINES)
    ]
    try:
        yield [f"http://127.0.0.1:{int(process.stdout.readline())}" for process in processes]
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def compare_clients(report: harness.Report, size: Size) -> None:
    """Interleaved stretches of the clients on the same engines."""

    async def measure(context: contextlib.AbstractAsyncContextManager[Sample], tasks: int) -> float:
        async with context as sample:
            return await stretch(sample, tasks, size.in_flight, size.measured)

    def ours() -> float:  # some more tasks than slots: in a run, requests always wait for one
        return asyncio.run(measure(our_client(urls, size.slots), size.in_flight + size.in_flight // 8))

    def checking() -> float:
        return asyncio.run(measure(checking_client(urls), size.in_flight))

    def bare() -> float:
        return asyncio.run(measure(bare_client(urls), size.in_flight))

    seconds: dict[Callable[[], float], list[float]] = {ours: [], checking: [], bare: []}
    orders = list(itertools.permutations(seconds))
    with engines(size.pair_median_s, 0.6, 4 * size.pair_median_s) as urls:
        for pair in range(harness.MIN_PAIRS):
            for which in orders[pair % len(orders)]:
                seconds[which].append(which())

    def facts(which: Callable[[], float]) -> tuple[float, dict[str, object]]:
        pairs = harness.Pairs(tuple(seconds[which]), tuple(seconds[bare]))
        low, high = pairs.quartiles
        return pairs.ratio, {
            "in_flight": size.in_flight,
            "pairs": harness.MIN_PAIRS,
            "quartiles": [round(low, 3), round(high, 3)],
            "ours_ms": round(1e3 * float(np.median(seconds[which])) / size.measured, 4),
            "bare_ms": round(1e3 * float(np.median(seconds[bare])) / size.measured, 4),
        }

    ratio, known = facts(ours)
    report.at_most("controller_load/client_cpu", ratio, "x bare aiohttp", GOAL_CLIENT, **known)
    ratio, known = facts(checking)
    report.show("controller_load/engine_client_alone_cpu", ratio, "x bare aiohttp", **known)


@dataclass(frozen=True)
class Reading:
    """What was seen when a batch of the whole run was leased."""

    busy_s: float
    """Slot-seconds of all engines."""
    at_s: float
    """Of all engines' clocks."""
    served: int
    peak: int
    """Requests at a time on one engine, at most."""
    cpu_s: float
    resident_bytes: int


def occupancy(first: Reading, last: Reading, slots: int) -> float:
    """Share of the slots in use between two readings; ``slots`` of one engine."""
    return (last.busy_s - first.busy_s) / (slots * (last.at_s - first.at_s))


def growth(readings: list[Reading]) -> float:
    """Bytes of resident memory a request: the slope of a line through the readings."""
    served = np.array([reading.served for reading in readings], dtype=float)
    return float(np.polyfit(served, [reading.resident_bytes for reading in readings], 1)[0])


async def whole_run(urls: list[str], size: Size, home: Path) -> list[Reading]:
    """A run of the controller from nothing to its last step; one reading a step."""
    groups_per_step = size.in_flight // 16
    steps = -(-size.requests // (groups_per_step * GROUP_SIZE))
    config = make_config(
        "load", groups_per_step=groups_per_step, group_size=GROUP_SIZE, steps=steps, max_lag_steps=MAX_LAG_STEPS
    )
    config.rollout.max_in_flight_per_engine = size.slots
    config.rollout.sampling.max_new_tokens = PARAMS.max_new_tokens
    controller = build_controller(
        config,
        home,
        CountingTask(PROMPT_TOKENS),
        CoinScorer(),
        urls,
        verify=lambda _: None,
        behavior_logprobs=False,
    )
    readings: list[Reading] = []
    async with aiohttp.ClientSession() as session:

        async def train() -> None:
            loads = []
            for url in urls:
                async with session.get(url + "/load") as reply:
                    loads.append(orjson.loads(await reply.read()))
            sums = {name: sum(load[name] for load in loads) for name in ("busy_s", "at_s", "served")}
            peak = max(load["peak"] for load in loads)
            readings.append(Reading(**sums, peak=peak, cpu_s=time.process_time(), resident_bytes=resident_bytes()))

        try:
            await controller.start()
            await Learner(controller, config, train).run()
        finally:
            await controller.stop()
    return readings


def load_controller(report: harness.Report, size: Size, *, judge_memory: bool) -> None:
    """The whole controller: occupancy, memory, CPU a request."""
    with (
        engines(size.run_median_s, 0.8, 10 * size.run_median_s) as urls,
        tempfile.TemporaryDirectory() as home,
    ):
        readings = asyncio.run(whole_run(urls, size, Path(home)))
    measured = readings[EDGE_STEPS:-EDGE_STEPS]
    first, last = measured[0], measured[-1]
    facts = {"slots": size.in_flight, "requests": last.served - first.served, "seconds": seconds_between(first, last)}
    assert readings[-1].peak <= size.slots
    report.at_least(
        "controller_load/occupancy", occupancy(first, last, size.slots), "of capacity", GOAL_OCCUPANCY, **facts
    )
    memory = {"resident_mib": round(last.resident_bytes / 2**20, 1), "requests": last.served - first.served}
    if judge_memory:
        report.at_most("controller_load/memory_growth", growth(measured), "bytes a request", GOAL_BYTES, **memory)
    else:
        report.show("controller_load/memory_growth", growth(measured), "bytes a request", **memory)
    cpu_ms = 1e3 * (last.cpu_s - first.cpu_s) / (last.served - first.served)
    report.show("controller_load/controller_cpu", cpu_ms, "ms a request", journal_and_learner=True)


def seconds_between(first: Reading, last: Reading) -> float:
    return round((last.at_s - first.at_s) / ENGINES, 1)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def allow_sockets(count: int) -> None:
    """Raise the limit of open files where it is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise SystemExit(f"{count} open files are needed, the limit is {hard}. Raise it (ulimit -Hn).")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    report = harness.Report("controller_load", save=arguments.save)
    size = QUICK if arguments.quick else FULL
    allow_sockets(2 * size.in_flight + 512)
    collect_rarely()  # as `asympo control` does; for the bare loop, too
    compare_clients(report, size)
    load_controller(report, size, judge_memory=not arguments.quick)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
