"""Statistics: merging, one reduction over real ranks, absent names, disagreement."""

import math
import random

import pytest
import torch
import torch.distributed as dist

from asympo_megatron.errors import StatError
from asympo_megatron.parallel import ParallelGroups, Stat, merge_stats, reduce_stats
from asympo_megatron.testing.distributed import run_threads

EDGES = (0.0, 1.0, 2.0, 4.0)


def everything(values: list[float]) -> dict[str, Stat]:
    tensor_N = torch.tensor(values, dtype=torch.float64)
    count = torch.tensor(len(values))
    double = Stat.mean(2 * tensor_N.sum(), count)
    return {
        "sum": Stat.sum(tensor_N.sum()),
        "mean": Stat.mean(tensor_N.sum(), count),
        "ess": Stat.ess(tensor_N),
        "ratio": Stat.ratio(double, Stat.mean(tensor_N.sum(), count)),
        "max": Stat.max(tensor_N),
        "min": Stat.min(tensor_N),
        "histogram": Stat.histogram(tensor_N, EDGES, torch.ones_like(tensor_N)),
    }


def test_hand_values():
    assert reduce_stats(everything([0.5, 1.5, 3.0]), None) == {
        "ess": 25.0 / 11.5,
        "histogram_p10": pytest.approx(0.3),
        "histogram_p50": pytest.approx(1.5),
        "histogram_p90": pytest.approx(2 + 2 * 0.7),
        "max": 3.0,
        "mean": 5.0 / 3,
        "min": 0.5,
        "ratio": 2.0,
        "sum": 5.0,
    }


def test_nothing_counted_is_nan():
    reduced = reduce_stats(everything([]), None)
    assert reduced.pop("sum") == 0
    assert all(math.isnan(value) for value in reduced.values())
    assert reduce_stats({}, None) == {}


def test_infinite_extremes_are_reported():
    reduced = reduce_stats({"max": Stat.max(torch.tensor([1.0, math.inf]))}, None)
    assert reduced == {"max": math.inf}


def test_open_bins_yield_their_edge():
    histogram = Stat.histogram(torch.tensor([-5.0, 9.0, 9.0]), EDGES, torch.ones(3))
    assert histogram.values_K.tolist() == [1, 0, 0, 0, 2]
    assert reduce_stats({"h": histogram}, None) == {"h_p10": 0.0, "h_p50": 4.0, "h_p90": 4.0}


def test_quantiles_interpolate_by_the_share_of_their_bin():
    histogram = Stat.histogram(torch.full((8,), 3.0), EDGES, torch.ones(8))  # all in (2, 4]
    assert reduce_stats({"h": histogram}, None) == pytest.approx({"h_p10": 2.2, "h_p50": 3.0, "h_p90": 3.8})


def test_histogram_weight_zero_leaves_out():
    histogram = Stat.histogram(torch.tensor([0.5, 3.0]), EDGES, torch.tensor([0, 2]))
    assert histogram.values_K.tolist() == [0, 0, 0, 2, 0]


def test_merge_equals_one_part():
    values = [random.Random(0).uniform(-1, 5) for _ in range(50)]
    want = reduce_stats(everything(values), None)
    parts = [everything(values[:7]), everything([]), everything(values[7:11]), everything(values[11:])]
    assert reduce_stats(merge_stats(parts), None) == pytest.approx(want, rel=1e-12)


def test_mean_is_not_a_mean_of_means():
    merged = merge_stats([everything([1.0]), everything([4.0, 4.0, 4.0])])
    assert reduce_stats(merged, None)["mean"] == 13 / 4


def test_names_may_be_absent_from_a_microbatch():
    merged = merge_stats([{"a": Stat.sum(torch.tensor(1.0))}, {"b": Stat.sum(torch.tensor(2.0))}])
    assert reduce_stats(merged, None) == {"a": 1.0, "b": 2.0}


def test_merging_different_kinds_is_refused():
    with pytest.raises(StatError, match="cannot merge a mean into a sum"):
        Stat.sum(torch.tensor(1.0)).merge(Stat.mean(torch.tensor(1.0), torch.tensor(1)))
    histogram = Stat.histogram(torch.zeros(1), EDGES, torch.ones(1))
    with pytest.raises(StatError, match="different edges"):
        histogram.merge(Stat.histogram(torch.zeros(1), (0.0, 1.0), torch.ones(1)))


def test_counts_stay_exact_beyond_float32():
    big = Stat.sum(torch.tensor(2**24 + 1))
    assert reduce_stats(merge_stats([{"n": big}, {"n": big}]), None) == {"n": 2.0**25 + 2}


def test_stats_hold_no_graph():
    source = torch.ones(2, requires_grad=True)
    assert not Stat.mean(source.sum(), torch.tensor(2)).values_K.requires_grad


# ---- over ranks ----------------------------------------------------------------------------------------------------

VALUES = [[0.25, 3.5], [], [1.5, 0.5, 2.5]]


def reduce_rank(group, parts):
    return reduce_stats(parts[group.rank()], group)


def test_ranks_get_what_one_rank_would():
    want = reduce_stats(everything([*VALUES[0], *VALUES[1], *VALUES[2]]), None)
    for got in run_threads(reduce_rank, 3, [everything(values) for values in VALUES]):
        assert got == pytest.approx(want, rel=1e-12)


def test_a_rank_without_statistics_takes_part():
    """No micro-batch on rank 1, another name on rank 2: everybody returns the same and nobody hangs."""
    parts = [everything(VALUES[0]), {}, {**everything(VALUES[2]), "extra": Stat.max(torch.tensor([7.0]))}]
    want = {**reduce_stats(everything([*VALUES[0], *VALUES[1], *VALUES[2]]), None), "extra": 7.0}
    for got in run_threads(reduce_rank, 3, parts):
        assert got == pytest.approx(want, rel=1e-12)
        assert list(got) == sorted(got)


def test_nobody_has_statistics():
    assert run_threads(reduce_rank, 2, [{}, {}]) == [{}, {}]


def test_disagreement_raises_on_every_rank():
    parts = [{"x": Stat.sum(torch.tensor(1.0))}, {"x": Stat.max(torch.tensor([1.0]))}]
    with pytest.raises(RuntimeError, match=r"StatError: ranks disagree on 'x': sum and max"):
        run_threads(reduce_rank, 2, parts)


def local_mean_rank(group, parts):
    """Mutant: every rank divides first, then the means are averaged."""
    local = torch.tensor(reduce_stats(parts[group.rank()], None)["mean"])
    dist.all_reduce(local, group=group)
    return {"mean": float(local) / group.size()}


def test_mutant_mean_of_rank_means():
    parts = [everything(values) for values in (VALUES[0], VALUES[2])]
    want = reduce_stats(everything(VALUES[0] + VALUES[2]), None)["mean"]
    assert run_threads(reduce_rank, 2, parts)[0]["mean"] == pytest.approx(want, rel=1e-12)
    assert run_threads(local_mean_rank, 2, parts)[0]["mean"] != pytest.approx(want, rel=1e-2)


def test_three_collectives_whatever_the_number_of_statistics(monkeypatch):
    calls: list[int] = []
    original = dist.all_reduce

    def counted(tensor, op=dist.ReduceOp.SUM, group=None):
        calls.append(tensor.numel() * tensor.element_size())
        return original(tensor, op=op, group=group)

    monkeypatch.setattr(dist, "all_reduce", counted)
    run_threads(reduce_rank, 1, [everything([1.0, 2.0])])
    assert calls == [16, 2 * 8, (1 + 2 + 2 + 4 + 5) * 8]


def sizes(group):
    groups = ParallelGroups(tensor=group, context=group)
    return groups.tensor_size, groups.tensor_rank, groups.context_size, groups.context_rank


def test_group_sizes_and_ranks():
    assert run_threads(sizes, 2) == [(2, 0, 2, 0), (2, 1, 2, 1)]
