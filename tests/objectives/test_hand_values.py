"""Literal inputs, literal expected arrays; every number below can be worked out on paper."""

import pytest
import torch

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives import GRPO, SFT, SPO, ASymPO, Reinforce
from asympo_megatron.objectives.diagnostics import INVERSE_NLL_EDGES
from asympo_megatron.parallel import reduce_stats

LOG2 = 0.6931471805599453


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# Two responses: A = +1 with NLLs 0.5, 1.5 (S = 2, n = 1) and A = -1 with NLLs 2, 2, 4, 8 (S = 16, n = 4).
NLL_T = tensor(9.0, 0.5, 1.5, 2.0, 2.0, 9.0, 4.0, 8.0)
BATCH = ResponseBatch(torch.tensor([-1, 0, 0, 1, 1, -1, 1, 1]), tensor(1.0, -1.0), torch.tensor([2, 4]))


@pytest.mark.parametrize(
    ("objective", "weights", "loss_sum", "count"),
    [
        (ASymPO(), [0, 0.5, 0.5, -0.0625, -0.0625, 0, -0.0625, -0.0625], 0.0, 2),
        (ASymPO(nll_floor=8.0), [0, 0.0625, 0.0625, -0.03125, -0.03125, 0, -0.03125, -0.03125], -0.375, 2),
        (Reinforce(), [0, 0.5, 0.5, -0.25, -0.25, 0, -0.25, -0.25], -3.0, 2),
        (SPO(negative_scale=0.5), [0, 0.5, 0.5, -0.125, -0.125, 0, -0.125, -0.125], -1.0, 2),
        (SPO(negative_scale=0.0), [0, 0.5, 0.5, 0, 0, 0, 0, 0], 1.0, 2),
        (SFT(), [0, 1, 1, 1, 1, 0, 1, 1], 18.0, 6),
    ],
)
def test_weights_and_loss(objective, weights, loss_sum, count):
    nll_T = NLL_T.clone().requires_grad_()
    out = objective(nll_T, BATCH)
    assert torch.autograd.grad(out.loss_sum, nll_T)[0].tolist() == weights
    assert float(out.loss_sum.detach()) == loss_sum
    assert int(out.normalizer_count) == count
    assert reduce_stats(dict(out.metrics), None)["loss"] == loss_sum / count


def test_asympo_metrics():
    metrics = reduce_stats(dict(ASymPO()(NLL_T, BATCH).metrics), None)
    assert metrics["J"] == pytest.approx((0 - 2 * LOG2) / 2)  # log 1 - log 4
    assert metrics["nll_pos"] == 1
    assert metrics["nll_neg"] == 4
    assert metrics["nll_ratio"] == 4
    assert metrics["nll"] == 2.5
    assert (metrics["abs_advantage_nll_pos"], metrics["abs_advantage_nll_neg"]) == (0.5, 2.0)
    assert (metrics["weighted_nll_pos"], metrics["weighted_nll_neg"]) == (0.5, 0.5)  # the balance that ASymPO restores
    assert metrics["ess"] == pytest.approx((1 + 0.25) ** 2 / (1 + 0.0625))
    assert (metrics["responses"], metrics["trained_tokens"], metrics["untrained_responses"]) == (2, 6, 0)
    assert (metrics["floored_fraction"], metrics["zero_advantage_fraction"]) == (0, 0)
    assert (metrics["nll_pos_max"], metrics["nll_neg_max"]) == (1, 4)
    assert metrics["inverse_nll_p10"] < 0.27 < 0.87 < metrics["inverse_nll_p90"] <= 1.0


def test_floored_fraction_counts_trained_responses_only():
    batch = ResponseBatch(BATCH.response_ids_T, tensor(1, -1, 0), torch.tensor([2, 4, 0]))
    metrics = reduce_stats(dict(ASymPO(nll_floor=2.0)(NLL_T, batch).metrics), None)
    assert metrics["floored_fraction"] == 0.5
    assert metrics["J"] == pytest.approx((LOG2 - 2 * LOG2) / 3)  # log of the floor, 2, instead of log 1
    assert metrics["untrained_responses"] == 1
    assert metrics["zero_advantage_fraction"] == pytest.approx(1 / 3)


def test_zero_advantage_is_neither_positive_nor_negative():
    batch = ResponseBatch(torch.tensor([0, 1, 2]), tensor(0.5, -0.5, 0.0), torch.tensor([1, 1, 1]))
    metrics = reduce_stats(dict(ASymPO(nll_floor=1.0)(tensor(1.0, 4.0, 32.0), batch).metrics), None)
    assert (metrics["nll_pos"], metrics["nll_neg"]) == (1, 4)
    assert metrics["nll"] == pytest.approx(37 / 3)
    assert metrics["floored_fraction"] == 0  # 1.0 is not below the floor of 1.0
    assert metrics["ess"] == pytest.approx((0.5 + 0.125) ** 2 / (0.25 + 0.015625))


def test_grpo_metrics():
    """Ratios 0.9 and 1.1, both followed: weights 0.9 and -1.1 on NLLs 1 and 3."""
    nll_T = tensor(1.0, 3.0)
    batch = ResponseBatch(
        torch.tensor([0, 1]),
        tensor(1.0, -1.0),
        torch.tensor([1, 1]),
        behavior_logprob_T=-nll_T - tensor(0.9, 1.1).log(),
    )
    metrics = reduce_stats(dict(GRPO()(nll_T, batch).metrics), None)
    assert metrics["weighted_nll_pos"] == pytest.approx(0.9 * 1 / 2)
    assert metrics["weighted_nll_neg"] == pytest.approx(1.1 * 3 / 2)
    assert metrics["ess"] == pytest.approx((0.9 + 1.1) ** 2 / (0.81 + 1.21))
    assert metrics["loss"] == pytest.approx((-0.9 + 1.1) / 2)
    assert metrics["ratio"] == pytest.approx(1.0)


def test_inverse_nll_bins_are_eight_a_decade():
    assert (INVERSE_NLL_EDGES[0], INVERSE_NLL_EDGES[16], INVERSE_NLL_EDGES[-1]) == (0.01, 1.0, 1e6)
    assert len(INVERSE_NLL_EDGES) == 65


@pytest.mark.parametrize(
    ("advantage", "ratio", "active"),
    [(1, 1.3, False), (1, 1.1, True), (1, 0.5, True), (-1, 1.3, True), (-1, 0.9, True), (-1, 0.5, False)],
)
def test_ppo_clip_is_one_sided(advantage, ratio, active):
    """A positive stops above 1 + clip, a negative below 1 - clip; the other side always pulls back."""
    nll_T = tensor(1.0)
    batch = ResponseBatch(
        torch.tensor([0]), tensor(advantage), torch.tensor([1]), behavior_logprob_T=-nll_T - tensor(ratio).log()
    )
    out = GRPO(clip_low=0.2, clip_high=0.2)(nll_T, batch)
    weight_T, _ = GRPO(clip_low=0.2, clip_high=0.2).weigh(nll_T, batch)
    assert weight_T.tolist() == pytest.approx([advantage * ratio if active else 0])
    metrics = reduce_stats(dict(out.metrics), None)
    clipped = min(max(ratio, 0.8), 1.2)
    assert metrics["loss"] == pytest.approx(-min(ratio * advantage, clipped * advantage))
    assert metrics["clip_fraction"] == (not active)
    assert metrics["ratio"] == metrics["ratio_max"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("options", "weights", "count"),
    [
        ({}, [0.5, 0.5, -1], 2),
        ({"normalizer": "constant", "constant_tokens": 4}, [0.25, 0.25, -0.25], 2),
        ({"normalizer": "tokens"}, [1, 1, -1], 3),
    ],
)
@pytest.mark.filterwarnings("ignore:normalizer='tokens'")
def test_grpo_normalizers(options, weights, count):
    nll_T = tensor(1.0, 2.0, 3.0)
    batch = ResponseBatch(torch.tensor([0, 0, 1]), tensor(1.0, -1.0), torch.tensor([2, 1]), behavior_logprob_T=-nll_T)
    objective = GRPO(**options)
    assert objective.weigh(nll_T, batch)[0].tolist() == weights
    assert int(objective.normalizer_count(batch)) == count


def test_ratio_kl_of_a_known_ratio():
    batch = ResponseBatch(torch.tensor([0, -1]), tensor(1.0), torch.tensor([1]), behavior_logprob_T=tensor(-1.0, 7.0))
    _, metrics = GRPO().weigh(tensor(1.0 - LOG2, 0.0), batch)  # r = 2
    assert reduce_stats(metrics, None)["ratio_kl"] == pytest.approx(2 - 1 - LOG2)
