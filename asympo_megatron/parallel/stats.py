"""Statistics that are sums until the very end: merged over micro-batches, reduced over DP x CP once a step.

Axis suffixes: K components of one statistic.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from asympo_megatron.errors import StatError
from asympo_megatron.parallel.groups import max_over, sum_over

QUANTILES = (0.1, 0.5, 0.9)
"""What a histogram becomes in the end: ``name_p10``, ``name_p50``, ``name_p90``."""

Layout = dict[str, tuple[str, tuple[float, ...]]]
"""Name to (kind, histogram edges): what all ranks must agree on before they reduce."""


@dataclass(frozen=True)
class Stat:
    """One statistic of the local tokens or responses, in a form that adds up across micro-batches and ranks.

    Build it with one of the class methods. Values are float64, so that counts beyond 2^24 stay exact.

    Args:
        kind: sum | mean | ess | ratio | max | min | histogram.
        values_K: float64 [K]: (sum) | (sum, count) | (sum, sum of squares) | (sum, count, sum, count) | (max) | (min)
            | counts of the bins.
        edges: ascending bin edges of a histogram; the outer two bins are open, so K = len(edges) + 1.
    """

    kind: str
    values_K: Tensor
    edges: tuple[float, ...] = ()

    @classmethod
    def sum(cls, value: Tensor) -> "Stat":
        """Total of a 0-d tensor."""
        return cls("sum", _pack(value))

    @classmethod
    def mean(cls, total: Tensor, count: Tensor) -> "Stat":
        """Sum of totals divided by sum of counts: never a mean of local means."""
        return cls("mean", _pack(total, count))

    @classmethod
    def ess(cls, weights: Tensor) -> "Stat":
        """Effective sample size (sum w)^2 / sum w^2 of non-negative weights of any shape."""
        wide = weights.double()
        return cls("ess", _pack(wide.sum(), (wide * wide).sum()))

    @classmethod
    def ratio(cls, numerator: "Stat", denominator: "Stat") -> "Stat":
        """Quotient of two means."""
        return cls("ratio", torch.cat([numerator.values_K, denominator.values_K]))

    @classmethod
    def max(cls, values: Tensor) -> "Stat":
        """Largest value of a tensor of any shape, an empty one included; -inf marks an absent value."""
        return cls("max", _pack(values.amax() if values.numel() else values.new_tensor(-math.inf)))

    @classmethod
    def min(cls, values: Tensor) -> "Stat":
        """Smallest value of a tensor of any shape, an empty one included; +inf marks an absent value."""
        return cls("min", _pack(values.amin() if values.numel() else values.new_tensor(math.inf)))

    @classmethod
    def histogram(cls, values: Tensor, edges: Sequence[float], weights: Tensor) -> "Stat":
        """Weighted counts of a 1-d tensor between fixed edges. A weight of 0 leaves a value out."""
        bins = torch.bucketize(values.double(), _on_device(tuple(edges), values.device))
        counts = torch.zeros(len(edges) + 1, dtype=torch.float64, device=values.device)
        return cls("histogram", counts.index_add_(0, bins, weights.double()), tuple(edges))

    def merge(self, other: "Stat") -> "Stat":
        """The statistic of both parts together.

        Raises:
            StatError: different kinds or edges.
        """
        if (self.kind, self.edges) != (other.kind, other.edges):
            raise StatError(f"cannot merge a {other.kind} into a {self.kind}, or histograms with different edges.")
        if self.kind == "max":
            return Stat("max", torch.maximum(self.values_K, other.values_K))
        if self.kind == "min":
            return Stat("min", torch.minimum(self.values_K, other.values_K))
        return Stat(self.kind, self.values_K + other.values_K, self.edges)


@functools.lru_cache
def _on_device(edges: tuple[float, ...], device: torch.device) -> Tensor:
    """Edges, brought there once: a copy from the host in every micro-batch would wait for all work before it."""
    return torch.tensor(edges, dtype=torch.float64, device=device)


def merge_stats(parts: Iterable[Mapping[str, Stat]]) -> dict[str, Stat]:
    """Merge the statistics of several micro-batches by name; a name may be absent from some of them."""
    merged: dict[str, Stat] = {}
    for part in parts:
        for name, stat in part.items():
            merged[name] = merged[name].merge(stat) if name in merged else stat
    return merged


def reduce_stats(
    stats: Mapping[str, Stat], group: dist.ProcessGroup | None, *, device: torch.device | None = None
) -> dict[str, float]:
    """Reduce statistics over all ranks of ``group`` to plain floats, equal on every rank.

    One SUM and one MAX all-reduce carry everything, after a 16-byte MAX that compares the layouts (names, kinds,
    edges). A rank that lacks a name, or has no statistic at all, still takes part: only then the layouts are
    exchanged and the absent ones count as nothing.

    Args:
        stats: what :func:`merge_stats` returned for this rank's micro-batches.
        group: DP x CP, or None for one rank. Every rank of it must call.
        device: where the buffers live when this rank may have no statistic (NCCL needs the GPU); else theirs.

    Returns:
        Name to float, sorted by name. NaN where nothing was counted. A histogram yields ``name_p10`` and so on.

    Raises:
        StatError: two ranks use one name for different kinds or edges.
    """
    first = next(iter(stats.values()), None)
    device = device if first is None else first.values_K.device
    layout: Layout = {name: (stats[name].kind, stats[name].edges) for name in sorted(stats)}
    if group is not None:
        layout = _agree(layout, group, device)
    full = {name: stats[name] if name in stats else _absent(*layout[name], device) for name in layout}
    extremes = [name for name in layout if layout[name][0] in _SIGN]
    sums = [name for name in layout if layout[name][0] not in _SIGN]
    empty = torch.zeros(0, dtype=torch.float64, device=device)
    high = max_over(torch.cat([empty, *(_SIGN[full[n].kind] * full[n].values_K for n in extremes)]), group).tolist()
    total = sum_over(torch.cat([empty, *(full[name].values_K for name in sums)]), group).tolist()
    result = {
        name: math.nan if value == -math.inf else _SIGN[layout[name][0]] * value
        for name, value in zip(extremes, high, strict=True)
    }
    start = 0
    for name in sums:
        kind, edges = layout[name]
        stop = start + full[name].values_K.numel()
        if kind == "histogram":
            result.update(_quantiles(name, total[start:stop], edges))
        else:
            result[name] = _FINISH[kind](*total[start:stop])
        start = stop
    return dict(sorted(result.items()))


def _pack(*values: Tensor) -> Tensor:
    return torch.stack([value.detach().double() for value in values])


def _divide(total: float, count: float) -> float:
    return total / count if count else math.nan


_SIGN = {"max": 1.0, "min": -1.0}
"""A minimum travels as the maximum of its negative."""

_FINISH: dict[str, Callable[..., float]] = {
    "sum": lambda total: total,
    "mean": _divide,
    "ess": lambda total, squares: _divide(total * total, squares),
    "ratio": lambda a, count_a, b, count_b: _divide(_divide(a, count_a), _divide(b, count_b)),
}

_COMPONENTS = {"sum": 1, "mean": 2, "ess": 2, "ratio": 4}


def _absent(kind: str, edges: tuple[float, ...], device: torch.device | None) -> Stat:
    """The statistic that changes nothing when merged."""
    if kind in _SIGN:
        values = torch.full((1,), -math.inf * _SIGN[kind], dtype=torch.float64, device=device)
    else:
        values = torch.zeros(_COMPONENTS.get(kind, len(edges) + 1), dtype=torch.float64, device=device)
    return Stat(kind, values, edges)


def _agree(layout: Layout, group: dist.ProcessGroup, device: torch.device | None) -> Layout:
    """The union of all ranks' layouts. Costs 16 bytes when they are equal, as they are on nearly every step."""
    text = json.dumps(layout).encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    high, negative_low = max_over(torch.tensor([digest, -digest], device=device), group).tolist()
    if high == -negative_low:
        return layout
    size = int(max_over(torch.tensor([len(text)], device=device), group).item())
    mine = torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8).to(device or "cpu")
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group=group)
    union: Layout = {}
    for part in gathered:
        for name, (kind, edges) in json.loads(bytes(part.tolist())).items():
            entry = (kind, tuple(edges))
            if union.setdefault(name, entry) != entry:
                raise StatError(f"ranks disagree on {name!r}: {union[name][0]} and {kind}, or different edges.")
    return dict(sorted(union.items()))


def _quantiles(name: str, counts: Sequence[float], edges: tuple[float, ...]) -> dict[str, float]:
    """Quantiles by linear interpolation inside the bin; the open outer bins yield their edge."""
    bins = [(edges[0], edges[0]), *pairwise(edges), (edges[-1], edges[-1])]
    return {f"{name}_p{round(100 * q)}": _quantile(q * math.fsum(counts), counts, bins) for q in QUANTILES}


def _quantile(rank: float, counts: Sequence[float], bins: Sequence[tuple[float, float]]) -> float:
    seen = 0.0
    value = math.nan
    for count, (low, high) in zip(counts, bins, strict=True):
        if count:
            value = low + (high - low) * min(1.0, (rank - seen) / count)
            if seen + count >= rank:
                break
            seen += count
    return value
