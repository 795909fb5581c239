"""fused_objective_loss against token_nll and the objective: loss, metrics, both gradients; mutants."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from fused_cases import CHUNKS, HIDDEN, OBJECTIVE_CASES, VOCAB, check_parity, in_one, in_two, leaves_of, make_case

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives import (
    ASymPO,
    Reinforce,
    build_objective,
    fused,
    fused_objective_loss,
)
from asympo_megatron.parallel import SINGLE

pytestmark = pytest.mark.filterwarnings("ignore:normalizer='tokens'")


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("objective", [case[1] for case in OBJECTIVE_CASES], ids=[case[0] for case in OBJECTIVE_CASES])
def test_loss_metrics_and_gradients_are_those_of_token_nll_and_objective(objective, chunk):
    case = make_case(objective)
    assert in_two(objective, case)[2].norm() > 1e-3
    check_parity(objective, case, chunk)


@pytest.mark.parametrize("objective", [case[1] for case in OBJECTIVE_CASES], ids=[case[0] for case in OBJECTIVE_CASES])
def test_float32(objective):
    case = make_case(objective).cast(torch.float32)
    want, got = in_two(objective, case), in_one(objective, case, 4)
    for which in (1, 2):
        assert (got[which] - want[which]).norm() <= 1e-6 * want[which].norm()
    # terms of both signs cancel in the loss: rounding is relative to what is added up
    pull = sum(float(want[3].metrics[f"weighted_nll_{sign}"].values_K[0]) for sign in ("pos", "neg"))
    assert abs(float(got[0] - want[0])) <= 1e-6 * pull


@pytest.mark.parametrize("lengths", [(), (0, 0), (1,), (1, 1, 1), (8, 8), (30,)])
@pytest.mark.parametrize("name", ["asympo", "reinforce", "gspo", "dapo"])
def test_awkward_batches(name, lengths):
    objective = build_objective(name)
    for chunk in (1, 64):
        check_parity(objective, make_case(objective, lengths, seed=1, temperature=1.0), chunk)


def test_no_token_at_all():
    """The loss is connected to both leaves, with gradient zero."""
    empty = ResponseBatch(torch.zeros(0, dtype=torch.long), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    hidden, weight = torch.zeros(0, HIDDEN, requires_grad=True), torch.ones(VOCAB, HIDDEN, requires_grad=True)
    out = fused_objective_loss(hidden, weight, torch.zeros(0, dtype=torch.long), empty, ASymPO())
    out.loss_sum.backward()
    assert (float(out.loss_sum.detach()), int(out.normalizer_count)) == (0.0, 2)
    assert hidden.grad.shape == (0, HIDDEN)
    assert torch.equal(weight.grad, torch.zeros(VOCAB, HIDDEN))


@pytest.mark.parametrize("name", ["asympo", "dapo"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(name, frozen):
    objective = build_objective(name)
    case = make_case(objective)
    leaves = leaves_of(case)
    leaves[frozen].requires_grad_(False)
    out = fused_objective_loss(*leaves, case.target, case.batch, objective, chunk_tokens=4, **case.options)
    out.loss_sum.backward()
    assert leaves[frozen].grad is None
    want = in_two(objective, case)[2 - frozen] * 7
    assert (leaves[1 - frozen].grad - want).norm() <= 1e-12 * want.norm()


def test_without_gradients_it_is_the_two_calls():
    objective, case = ASymPO(), make_case(ASymPO())
    want = in_two(objective, case)
    with torch.no_grad():
        out = fused_objective_loss(*leaves_of(case), case.target, case.batch, objective, **case.options)
    for found in (
        out,
        fused_objective_loss(case.hidden, case.weight, case.target, case.batch, objective, **case.options),
    ):
        assert not found.loss_sum.requires_grad
        torch.testing.assert_close(found.loss_sum, want[0], rtol=1e-12, atol=1e-12)


def test_bf16_errs_about_as_much_as_token_nll():
    """Against float64 on the same rounded inputs, with the scratch and without. 1.5: the factor of the loss comes after
    the products, in which case hidden states' gradients are rounded twice."""
    objective = ASymPO()
    rounded = make_case(objective).cast(torch.bfloat16)
    exact = in_two(objective, rounded.cast(torch.float64))
    peer = in_two(objective, rounded)
    for chunk in (4, 64):
        got = in_one(objective, rounded, chunk)
        for which in (1, 2):
            error = (got[which].double() - exact[which]).norm()
            assert error <= 1.5 * (peer[which].double() - exact[which]).norm()
            assert error <= 5e-3 * exact[which].norm()


class WeightOfAnotherResponse(ASymPO):
    """Takes the advantage of the previous response of the micro-batch: one reason why a scope has to be declared."""

    def weigh(self, token_nll_T, batch, groups=SINGLE):
        return super().weigh(token_nll_T, replace(batch, advantage_R=batch.advantage_R.roll(1)), groups)


@pytest.mark.parametrize("chunk", [4, 8])
def test_mutant_weight_of_another_response(chunk):
    with pytest.raises(AssertionError):
        check_parity(WeightOfAnotherResponse(), make_case(ASymPO()), chunk)


class ScratchNotCleared(fused._SinglePass):
    def _cleared_scratch(self):
        return super()._cleared_scratch() if self._scratch_VH is None else self._scratch_VH


WithGradients = fused._WithGradients


class FactorDropped(WithGradients):
    @staticmethod
    def backward(ctx, grad_loss):
        return WithGradients.backward(ctx, torch.ones_like(grad_loss))


class UnseenTokensForgotten(fused._SinglePass):
    """Weighs a response by its last chunk alone."""

    def _score(self, part):
        self.nll_K[: part.start] = 0
        return super()._score(part)


@pytest.mark.parametrize(
    ("place", "mutant", "chunk"),
    [
        ("_SinglePass", ScratchNotCleared, 4),
        ("_SinglePass", UnseenTokensForgotten, 4),
        ("_WithGradients", FactorDropped, 64),
    ],
)
def test_mutant_of_the_pass(monkeypatch, place, mutant, chunk):
    check_parity(ASymPO(), make_case(ASymPO()), chunk)
    monkeypatch.setattr(fused, place, mutant)
    with pytest.raises(AssertionError):
        check_parity(ASymPO(), make_case(ASymPO()), chunk)


def test_scratch_objectives_differ_from_token_objectives_where_it_matters():
    """A scope that says too little is caught by parity, too: ASymPO weighed before its response is complete."""

    class Hasty(ASymPO):
        weight_scope: ClassVar[str] = "token"

    check_parity(Hasty(), make_case(ASymPO()), 64)
    with pytest.raises(AssertionError):
        check_parity(Hasty(), make_case(ASymPO()), 4)
    check_parity(Reinforce(), make_case(Reinforce()), 4)
