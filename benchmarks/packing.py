"""Packing 4,096 responses of log-normal length: balance in true cost, micro-batches, padding and planning time.

    python benchmarks/packing.py [--seeds 0 1 2] [--quick] [--save]

Lengths have a median of 1,500 tokens, sigma 0.9 and a cap of 16,384, which is the budget of a micro-batch too. Beside
our plan stand two plain implementations of what other stacks do, on the same lengths in the same run:

- first_fit: first-fit-decreasing by tokens under the budget, the largest micro-batches split until every rank gets as
  many, micro-batches to ranks by Karmarkar-Karp on their cost (slime, utils/dp_schedule.py with --balance-data; there
  first fit runs in order of arrival).
- karmarkar_karp: responses to ranks by Karmarkar-Karp on tokens, as many on each rank, then a rank's responses to
  ceil(tokens / budget) micro-batches in the same way (verl, utils/seqlen_balancing.py). Nothing holds it to the budget:
  see `fullest_microbatch`, in units of the budget.

The true cost is that of Qwen3-1.7B with its output layer, not the planner's own estimate. Several seeds, all reported;
--quick takes the first. Results: docs/performance.md.
"""

import heapq
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import harness
import numpy as np

from asympo_megatron.packing import plan_microbatches

ROWS, MEDIAN, SIGMA, CAP, BUDGET = 4096, 1500, 0.9, 16384, 16384
DP_SIZES = (1, 2, 4, 8, 16, 32, 64)
PADDING = {"DP": (1, 1), "TP8+SP": (1, 8), "CP2 x TP8+SP": (4, 32), "CP4 x TP8+SP": (8, 64), "CP8": (16, 16)}
"""Layout to the multiples that a row and a micro-batch are padded to."""
REPEATS = 5

Assignment = Sequence[Sequence[Sequence[int]]]
"""``assignment[dp_rank][k]`` lists rows."""


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    report = harness.Report("packing", save=arguments.save)
    for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
        lengths = lognormal_lengths(seed)
        for dp_size in DP_SIZES:
            ours(report, lengths, seed, dp_size)
            for method in (first_fit, karmarkar_karp):
                theirs(report, method, lengths, seed, dp_size)
        for layout, multiples in PADDING.items():
            padding(report, lengths, seed, layout, *multiples)
    return report.finish()


def lognormal_lengths(seed: int) -> list[int]:
    """Prompt and response of each row, in tokens."""
    draw = np.random.default_rng(seed).normal(math.log(MEDIAN), SIGMA, ROWS)
    return np.clip(np.exp(draw).astype(int), 1, CAP).tolist()


def true_cost(length: int) -> float:
    """Forward FLOPs of one sequence in Qwen3-1.7B: linear maps, causal attention, output layer."""
    hidden, layers, queries, keys, ffn, vocabulary = 2048, 28, 2048, 1024, 6144, 151936
    linear = layers * 2 * (hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * ffn)
    return length * (linear + 2.0 * hidden * vocabulary) + layers * 2.0 * queries * length**2


def imbalance(assignment: Assignment, lengths: Sequence[int]) -> float:
    """True cost of the slowest rank over the mean, minus 1."""
    ranks = [math.fsum(true_cost(lengths[row]) for part in rank for row in part) for rank in assignment]
    return max(ranks) / statistics.fmean(ranks) - 1


def ours(report: harness.Report, lengths: list[int], seed: int, dp_size: int) -> None:
    plan, seconds = timed(lambda: plan_microbatches(lengths, dp_size=dp_size, max_tokens=BUDGET), REPEATS)
    least = max(1, math.ceil(sum(lengths) / (dp_size * BUDGET)))
    facts = {"seed": seed, "dp_size": dp_size}
    uneven = imbalance(plan.microbatches, lengths)
    if dp_size == max(DP_SIZES):
        report.at_most("packing/imbalance", uneven, "fraction", 0.01, **facts)
    else:
        report.show("packing/imbalance", uneven, "fraction", **facts)
    report.within("packing/microbatches", plan.num_microbatches, "a rank", least, least + 1, **facts)
    report.at_most("packing/fullest_microbatch", fullest(plan.microbatches, lengths), "budgets", 1.0, **facts)
    report.at_most("packing/planning", 1e3 * seconds, "ms of CPU", 60.0, **facts)


def padding(report: harness.Report, lengths: list[int], seed: int, layout: str, row: int, pack: int) -> None:
    """Tokens computed beyond the real ones, of all micro-batches."""
    plan = plan_microbatches(lengths, dp_size=8, max_tokens=BUDGET, pad_multiple=row, pack_multiple=pack)
    computed = 0
    for part in (part for rank in plan.microbatches for part in rank):
        tokens = sum(lengths[k] + -lengths[k] % row for k in part)
        computed += max(tokens + -tokens % pack, pack)  # an empty one still computes a dummy sequence
    share = computed / sum(lengths) - 1
    report.at_most("packing/padding_tokens", share, "fraction", 0.005, seed=seed, layout=layout)


def theirs(
    report: harness.Report,
    method: Callable[[list[int], int], Assignment],
    lengths: list[int],
    seed: int,
    dp_size: int,
) -> None:
    assignment, seconds = timed(lambda: method(lengths, dp_size), 1)
    rows = sorted(row for rank in assignment for part in rank for row in part)
    assert rows == list(range(len(lengths)))
    facts = {
        "seed": seed,
        "dp_size": dp_size,
        "microbatches": max(map(len, assignment)),
        "fullest_microbatch": round(fullest(assignment, lengths), 4),
        "planning_ms": round(1e3 * seconds, 1),
    }
    report.show(f"packing/{method.__name__}/imbalance", imbalance(assignment, lengths), "fraction", **facts)


def fullest(assignment: Assignment, lengths: Sequence[int]) -> float:
    return max(sum(lengths[row] for row in part) for rank in assignment for part in rank) / BUDGET


def timed(call, repeats: int):
    """What ``call`` returns, and the median of its CPU seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def first_fit(lengths: list[int], dp_size: int) -> Assignment:
    bins: list[list[int]] = []
    loads: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((k for k, load in enumerate(loads) if load + lengths[row] <= BUDGET), len(bins))
        if place == len(bins):
            bins.append([])
            loads.append(0)
        bins[place].append(row)
        loads[place] += lengths[row]
    while len(bins) % dp_size:
        largest = max((k for k in range(len(bins)) if len(bins[k]) > 1), key=lambda k: loads[k])
        halves = largest_differencing([lengths[row] for row in bins[largest]], 2, equal_size=False)
        parts = [[bins[largest][i] for i in half] for half in halves]
        bins[largest : largest + 1] = parts
        loads[largest : largest + 1] = [sum(lengths[row] for row in part) for part in parts]
    prices = [math.fsum(true_cost(lengths[row]) for row in part) for part in bins]
    return [[bins[k] for k in rank] for rank in largest_differencing(prices, dp_size, equal_size=True)]


def karmarkar_karp(lengths: list[int], dp_size: int) -> Assignment:
    ranks = largest_differencing(lengths, dp_size, equal_size=True)
    tokens = [sum(lengths[row] for row in rows) for rows in ranks]
    count = math.ceil(max(tokens) / BUDGET)
    assignment = []
    for rows in ranks:
        parts = largest_differencing([lengths[row] for row in rows], count, equal_size=False)
        assignment.append([[rows[i] for i in part] for part in parts])
    return assignment


def largest_differencing(values: Sequence[float], bins: int, *, equal_size: bool) -> list[list[int]]:
    """Karmarkar and Karp: join the two most uneven partial solutions, largest bin to smallest, until one is left.

    ``equal_size`` starts from partial solutions of ``bins`` items each, so that all bins end with as many items.
    """
    order = sorted(range(len(values)), key=lambda item: -values[item])
    size = bins if equal_size else 1
    heap = []
    for start in range(0, len(order), size):
        items = order[start : start + size]
        sets = [(values[item], [item]) for item in items] + [(0, []) for _ in range(bins - len(items))]
        heap.append((sets[-1][0] - sets[0][0], start, sets))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, number, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        joined = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(first, reversed(second), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], number, joined))
    return [items for _, items in heap[0][2]]


if __name__ == "__main__":
    sys.exit(main())
