"""The batch that adapters are compared on holds what it promises, and the comparison notices wrong gradients."""

import pytest
import torch
from parity import CASES, assert_same_gradient, core_gradient, make_batch

from asympo_megatron.objectives import build_objective


def test_the_batch_holds_the_awkward_cases():
    batch = make_batch()
    count_R = batch.token_count_R.tolist()
    assert 0 in count_R
    assert 1 in batch.response_length_R.tolist()
    assert sum(count < length for count, length in zip(count_R, batch.response_length_R.tolist(), strict=True)) > 3
    groups = batch.advantage_R.view(-1, 4)
    assert [bool((group == 0).all()) for group in groups] == [False, True, False]
    torch.testing.assert_close(groups.sum(1), torch.zeros(3), rtol=0, atol=1e-6)
    nll = -batch.logprob(batch.logits_PV)
    mean_R = [float(nll[batch.response_ids_P == row].mean()) for row in range(batch.num_responses)]
    below = [row for row, mean in enumerate(mean_R) if mean < CASES["asympo"]["nll_floor"]]
    assert below
    assert all(batch.advantage_R[row] for row in below)
    assert any(advantage < 0 for advantage in batch.advantage_R.tolist())


def test_packed_sequences_score_the_same_tokens():
    batch = make_batch()
    logits_SV = batch.sequence_logits(batch.logits_PV)
    scored = torch.log_softmax(logits_SV[:-1], -1).gather(-1, batch.sequence_tokens[1:, None]).squeeze(-1)
    assert torch.equal(scored[batch.scoring_index_P], batch.logprob(batch.logits_PV))


def test_a_micro_batch_is_a_part_of_the_batch():
    batch = make_batch()
    part, index = batch.rows([7, 2])
    assert torch.equal(part.pad(part.token_P)[0, :4], batch.pad(batch.token_P)[7, :4])
    assert torch.equal(part.logits_PV, batch.logits_PV[index])
    assert part.mask_RL.sum(1).tolist() == batch.mask_RL.sum(1)[[7, 2]].tolist()


def weigh_all_tokens_alike(leaf_PV, batch):
    """Token-mean aggregation across responses."""
    nll_P = torch.where(batch.mask_P, -batch.logprob(leaf_PV), 0.0)
    return (batch.advantage_R[batch.row_P] * nll_P).sum() / batch.mask_P.sum()


def divide_by_trained_responses(leaf_PV, batch):
    """The masked response falls out of N."""
    nll_R = torch.zeros(12).index_add(0, batch.row_P, torch.where(batch.mask_P, -batch.logprob(leaf_PV), 0.0))
    scale_R = torch.maximum(nll_R.detach(), 0.5 * batch.token_count_R).clamp(min=1e-9)
    return (batch.advantage_R * nll_R / scale_R).sum() / (batch.token_count_R > 0).sum()


def train_tool_tokens(leaf_PV, batch):
    """The mask is forgotten."""
    nll_R = torch.zeros(12).index_add(0, batch.row_P, -batch.logprob(leaf_PV))
    return (batch.advantage_R * nll_R / torch.maximum(nll_R.detach(), 0.5 * batch.response_length_R)).sum() / 12


def forget_the_floor(leaf_PV, batch):
    """S_i alone in the denominator."""
    nll_R = torch.zeros(12).index_add(0, batch.row_P, torch.where(batch.mask_P, -batch.logprob(leaf_PV), 0.0))
    return (batch.advantage_R * nll_R / nll_R.detach().clamp(min=1e-9)).sum() / 12


@pytest.mark.parametrize(
    "mutant", [weigh_all_tokens_alike, divide_by_trained_responses, train_tool_tokens, forget_the_floor]
)
def test_the_comparison_catches(mutant):
    batch = make_batch()
    _, want = core_gradient(build_objective("asympo", **CASES["asympo"]), batch)
    leaf_PV = batch.leaf()
    got = torch.autograd.grad(mutant(leaf_PV, batch), leaf_PV)[0]
    with pytest.raises(AssertionError, match="relative error"):
        assert_same_gradient(got, want, batch)
    assert_same_gradient(want, want, batch)
