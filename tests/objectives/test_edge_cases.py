"""Empty, extreme and wrong input."""

import math

import pytest
import torch

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import BatchError
from asympo_megatron.objectives import GRPO, OBJECTIVES, ASymPO, Reinforce, build_objective
from asympo_megatron.parallel import reduce_stats

NAMES = sorted(OBJECTIVES)
TOKEN_MEAN = ("sft", "dapo", "cispo", "vespo", "m2po")


def make_batch(ids, advantages, counts, dtype=torch.float64):
    return ResponseBatch(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(advantages, dtype=dtype),
        torch.tensor(counts, dtype=torch.long),
        behavior_logprob_T=torch.full((len(ids),), -1.0, dtype=dtype),
        proximal_logprob_T=torch.full((len(ids),), -1.0, dtype=dtype),
        statistics={"m2_bound": torch.tensor(math.inf)},
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("ids", "advantages", "counts"),
    [([], [], []), ([], [1.0], [0]), ([-1, -1], [], []), ([-1, -1], [1.0, -1.0], [0, 0])],
    ids=["nothing", "row without tokens", "padding only", "all masked"],
)
def test_no_trained_token_still_has_a_backward(name, ids, advantages, counts):
    source = torch.ones(len(ids), dtype=torch.float64, requires_grad=True)
    out = build_objective(name)(2 * source, make_batch(ids, advantages, counts))
    (grad,) = torch.autograd.grad(out.loss_sum, source)
    assert grad.tolist() == [0.0] * len(ids)
    assert float(out.loss_sum.detach()) == 0
    assert int(out.normalizer_count) == (0 if name in TOKEN_MEAN else len(advantages))
    metrics = reduce_stats(dict(out.metrics), None)
    assert math.isnan(metrics["nll"])
    assert metrics["trained_tokens"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_metric_names_do_not_depend_on_the_data(name):
    """Ranks with and without positives, negatives or tokens reduce the same layout."""
    objective = build_objective(name)
    empty = objective(torch.zeros(0, dtype=torch.float64), make_batch([], [], []))
    full = objective(torch.ones(2, dtype=torch.float64), make_batch([0, 1], [1.0, -1.0], [1, 1]))
    assert {name: stat.kind for name, stat in empty.metrics.items()} == {
        name: stat.kind for name, stat in full.metrics.items()
    }


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("sft", "asymre")])
def test_zero_variance_trains_nothing_and_stays_in_n(name):
    nll_T = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    out = build_objective(name)(nll_T, make_batch([0, 0, 1], [0.0, 0.0], [2, 1]))
    assert torch.autograd.grad(out.loss_sum, nll_T)[0].tolist() == [0, 0, 0]
    assert int(out.normalizer_count) == (3 if name in TOKEN_MEAN else 2)
    assert reduce_stats(dict(out.metrics), None)["zero_advantage_fraction"] == 1


def test_asymre_trains_on_groups_without_variance():
    """Its baseline is below the mean: responses that are all as good as each other still count as good."""
    weight_T, _ = build_objective("asymre", delta=-0.25).weigh(torch.ones(3), make_batch([0, 0, 1], [0.0, 0.0], [2, 1]))
    assert weight_T.tolist() == [0.125, 0.125, 0.25]


def test_floor_bounds_the_weight_of_a_certain_response():
    batch = make_batch([0, 0, 1], [1.0, -1.0], [2, 1])
    weight_T, metrics = ASymPO(nll_floor=1e-3).weigh(torch.zeros(3, dtype=torch.float64), batch)
    assert weight_T.tolist() == [500.0, 500.0, -1000.0]
    reduced = reduce_stats(metrics, None)
    assert reduced["floored_fraction"] == 1
    assert reduced["J"] == pytest.approx(0.0)  # (log floor - log floor) / 2


@pytest.mark.parametrize("objective", [ASymPO(), Reinforce(), GRPO()])
def test_count_zero_means_weight_zero(objective):
    """Masking a response by its count alone suffices, even where its tokens still carry its row."""
    batch = make_batch([0, 0, 1], [1.0, -1.0], [0, 1])
    weight_T, _ = objective.weigh(torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64), batch)  # ratio 1 for the last
    assert weight_T.tolist() == [0.0, 0.0, -1.0]


def test_one_token_response_on_the_floor_boundary():
    batch = make_batch([0], [1.0], [1])
    below, _ = ASymPO(nll_floor=0.5).weigh(torch.tensor([0.25], dtype=torch.float64), batch)
    above, _ = ASymPO(nll_floor=0.5).weigh(torch.tensor([4.0], dtype=torch.float64), batch)
    assert (below.tolist(), above.tolist()) == ([2.0], [0.25])


def test_huge_nll_limits_itself():
    batch = make_batch([0, 1], [1.0, -1.0], [1, 1], torch.float32)
    nll_T = torch.tensor([1e30, 1e-30], requires_grad=True)
    out = ASymPO()(nll_T, batch)
    assert torch.autograd.grad(out.loss_sum, nll_T)[0].tolist() == pytest.approx([1e-30, -1e3])
    assert math.isfinite(reduce_stats(dict(out.metrics), None)["J"])


def test_infinite_trained_nll_is_loud():
    """An impossible token makes the loss NaN, so that the trainer refuses the step; it is not skipped in silence."""
    out = ASymPO()(torch.tensor([math.inf, 1.0]), make_batch([0, 1], [1.0, -1.0], [1, 1], torch.float32))
    assert math.isnan(float(out.loss_sum))


def test_unrelated_policies_do_not_overflow_the_ratio():
    batch = make_batch([0, 1], [1.0, -1.0], [1, 1], torch.float32)
    weight_T, metrics = GRPO().weigh(torch.tensor([-200.0, -200.0]), batch)
    assert weight_T.tolist() == pytest.approx([0.0, -math.exp(20)])
    assert math.isfinite(reduce_stats(metrics, None)["ratio_max"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_run_in_float32_whatever_comes_in(dtype):
    """4,096 tokens of 1.0: a bfloat16 or float16 sum would stop growing at 256 or 2048."""
    tokens = 4096
    nll_T = torch.ones(tokens, dtype=dtype)
    batch = make_batch([0] * tokens, [1.0], [tokens], torch.float32)
    weight_T, _ = ASymPO().weigh(nll_T, batch)
    assert weight_T.dtype == torch.float32
    assert weight_T.unique().tolist() == [1 / tokens]
    assert float(Reinforce()(nll_T, batch).loss_sum) == 1.0


def test_missing_behavior_logprobs_name_the_need():
    batch = ResponseBatch(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([1]))
    with pytest.raises(BatchError, match=r"objective 'grpo' needs behavior_logprob_T.*asympo, spo, reinforce"):
        GRPO()(torch.ones(1), batch)


def test_nll_of_the_wrong_length():
    with pytest.raises(BatchError, match=r"token_nll_T has shape \(3,\) and response_ids_T \(1,\)"):
        ASymPO()(torch.ones(3), make_batch([0], [1.0], [1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_ids_T": torch.tensor([0], dtype=torch.int32)}, r"response_ids_T has dtype torch.int32.*\.long\(\)"),
        ({"advantage_R": torch.tensor([1])}, r"advantage_R has dtype torch.int64.*\.float\(\)"),
        ({"token_count_R": torch.tensor([1, 1])}, r"advantage_R has shape \(1,\) and token_count_R \(2,\)"),
        ({"response_ids_T": torch.tensor([[0]])}, r"response_ids_T has shape \(1, 1\), expected 1 dim"),
        ({"behavior_logprob_T": torch.zeros(2)}, r"behavior_logprob_T has shape \(2,\), expected \(1,\)"),
    ],
)
def test_batches_that_do_not_fit(change, message):
    fields = {
        "response_ids_T": torch.tensor([0]),
        "advantage_R": torch.tensor([1.0]),
        "token_count_R": torch.tensor([1]),
    }
    with pytest.raises(BatchError, match=message):
        ResponseBatch(**{**fields, **change})
