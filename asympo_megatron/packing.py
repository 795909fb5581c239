"""Which response goes to which data-parallel rank and micro-batch.

    lengths -> balance cost over DP ranks -> split each rank's rows into micro-batches under the token budget

Pure integers: every rank computes the same plan from the lease's manifest, without communication.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asympo_megatron.errors import PackingError

Cost = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Padded lengths to the time each sequence costs, in any unit."""


@dataclass(frozen=True)
class Plan:
    """Where every row goes.

    Args:
        microbatches: ``microbatches[dp_rank][k]`` lists row indices, ascending. All ranks have the same number of
            micro-batches, at least one; some may be empty.
        rank_cost: estimated cost of each rank, in the unit of the cost function.
    """

    microbatches: tuple[tuple[tuple[int, ...], ...], ...]
    rank_cost: tuple[float, ...]

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per data-parallel rank."""
        return len(self.microbatches[0])

    @property
    def imbalance(self) -> float:
        """Cost of the slowest rank over the mean, minus 1: the share of the step that the others wait."""
        total = math.fsum(self.rank_cost)
        return max(self.rank_cost) * len(self.rank_cost) / total - 1 if total else 0.0


def attention_cost(hidden_size: int = 2048) -> Cost:
    """Cost of a decoder: linear layers grow with the length, causal attention with its square.

    A layer takes about 24 H^2 FLOPs a token in its linear maps and 2 H L^2 in causal attention over L tokens, so the
    cost is L (1 + L / (12 H)). A mixture of experts or a narrow MLP shifts the constant, hardly the balance.
    """
    return lambda lengths: lengths * (1.0 + lengths / (12.0 * hidden_size))


def plan_microbatches(
    lengths: Sequence[int],
    *,
    dp_size: int,
    max_tokens: int,
    pad_multiple: int = 1,
    pack_multiple: int = 1,
    cost: Cost | None = None,
) -> Plan:
    """Distribute rows over data-parallel ranks and micro-batches, deterministically.

    Balances the cost of the ranks, then of each rank's micro-batches. The number of micro-batches per rank is
    max(1, ceil(tokens / (DP x budget))) or one more, unless rows are so large against the budget that they do not fit
    that way (many of just over half of it, say): then it is the smallest that was found to fit.

    Args:
        lengths: tokens of each row, prompt and response together.
        dp_size: data-parallel ranks.
        max_tokens: budget of one micro-batch on one DP rank, over its CP ranks together, padding included.
        pad_multiple: every row is padded to a multiple of it (2 x CP).
        pack_multiple: a micro-batch is padded to a multiple of it (that, times TP under sequence parallelism).
        cost: padded lengths to costs; default :func:`attention_cost`.

    Raises:
        PackingError: a row alone exceeds the budget, or an argument is out of range.
    """
    size = _padded(lengths, dp_size, max_tokens, pad_multiple, pack_multiple)
    max_tokens -= max_tokens % pack_multiple
    weight = np.asarray((cost or attention_cost())(size), dtype=np.float64)
    order = np.lexsort((np.arange(size.size), -size, -weight)).tolist()
    tokens, costs = size.tolist(), weight.tolist()
    least = max(1, math.ceil(sum(tokens) / (dp_size * max_tokens)))
    for count in (least, least + 1):
        ranks = _balance(order, tokens, costs, bins=dp_size, max_tokens=count * max_tokens)
        parts = [_balance(rows, tokens, costs, count, max_tokens) for rows in ranks] if ranks is not None else [None]
        found = [part for part in parts if part is not None]
        if len(found) == dp_size:
            return _plan(found, costs)
    bins = _best_fit(order, tokens, max_tokens)
    return _plan(_deal(bins, costs, dp_size), costs)


def _padded(
    lengths: Sequence[int], dp_size: int, max_tokens: int, pad_multiple: int, pack_multiple: int
) -> NDArray[np.int64]:
    numbers = {"dp_size": dp_size, "max_tokens": max_tokens, "pad_multiple": pad_multiple}
    for name, value in {**numbers, "pack_multiple": pack_multiple}.items():
        if value < 1:
            raise PackingError(f"{name} is {value}; it must be at least 1.")
    raw = np.asarray(lengths, dtype=np.int64)
    size = -(-raw // pad_multiple) * pad_multiple
    if raw.size and raw.min() < 0:
        raise PackingError(f"response {int(raw.argmin())} has {int(raw.min())} tokens; a length is at least 0.")
    longest = int(size.max()) if size.size else 0
    if longest + -longest % pack_multiple > max_tokens:
        row, multiple = int(size.argmax()), math.lcm(pad_multiple, pack_multiple)
        alone = int(raw[row]) + -int(raw[row]) % multiple
        padded = f" ({alone} padded to a multiple of {multiple})" if alone != raw[row] else ""
        raise PackingError(
            f"response {row} has {int(raw[row])} tokens{padded}; max_tokens_per_microbatch is {max_tokens}. "
            "Raise it or filter prompts."
        )
    return size


def _balance(
    rows: Sequence[int], tokens: Sequence[int], costs: Sequence[float], bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Longest processing time first: each row to the cheapest bin that has room; None when some row finds none.

    Rows come longest first, but for odd cost functions: a bin found too full for one waits aside until rows are short
    enough, instead of being passed over again for every row in between.
    """
    filled: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0.0, index, max_tokens) for index in range(bins)]  # (cost, bin, free tokens), cheapest first
    aside: list[tuple[int, int, float]] = []  # (-free tokens, bin, cost), emptiest first
    for row in rows:
        size = tokens[row]
        while aside and -aside[0][0] >= size:
            free, index, load = heapq.heappop(aside)
            heapq.heappush(heap, (load, index, -free))
        while heap and heap[0][2] < size:
            load, index, free = heapq.heappop(heap)
            heapq.heappush(aside, (-free, index, load))
        if not heap:
            return None
        load, index, free = heap[0]
        filled[index].append(row)
        heapq.heapreplace(heap, (load + costs[row], index, free - size))
    return filled


def _best_fit(rows: Sequence[int], tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Best fit decreasing: each row into the fullest bin that has room, or into a new one."""
    filled: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for row in sorted(rows, key=lambda row: -tokens[row]):
        place = bisect_left(room, (tokens[row], -1))
        if place == len(room):
            filled.append([row])
            insort(room, (max_tokens - tokens[row], len(filled) - 1))
        else:
            free, index = room.pop(place)
            filled[index].append(row)
            insort(room, (free - tokens[row], index))
    return filled


def _deal(bins: list[list[int]], costs: Sequence[float], dp_size: int) -> list[list[list[int]]]:
    """Whole micro-batches to ranks, dearest first, each to the cheapest rank that has a free place."""
    count = math.ceil(len(bins) / dp_size)
    prices = [math.fsum(costs[row] for row in rows) for rows in bins]
    order = sorted(range(len(bins)), key=lambda index: -prices[index])
    places = _balance(order, [1] * len(bins), prices, dp_size, count)
    assert places is not None  # count x dp_size places for len(bins) bins of size 1
    return [[bins[index] for index in place] + [[]] * (count - len(place)) for place in places]


def _plan(parts: Sequence[Sequence[Sequence[int]]], costs: Sequence[float]) -> Plan:
    microbatches = tuple(tuple(tuple(sorted(rows)) for rows in part) for part in parts)
    rank_cost = tuple(math.fsum(costs[row] for rows in part for row in rows) for part in parts)
    return Plan(microbatches, rank_cost)
