"""The KL penalty: slow twins, exact expectations over all responses of a small policy, mutants."""

import itertools
import math

import pytest
import torch
from objective_checks import (
    check_context,
    check_masked,
    check_partition,
    check_permutation,
    check_twin,
    context_cuts,
    context_rank,
    make_case,
)

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import BatchError, ConfigError, UnknownNameError
from asympo_megatron.objectives import KLPenalty, Reinforce, build_objective, penalize_kl
from asympo_megatron.parallel import SINGLE, spread_to_tokens
from asympo_megatron.testing.distributed import run_threads

COEF = 0.3
ESTIMATORS = ("k1", "k2", "k3")
BASES = [
    ("asympo", {"nll_floor": 1e-3}),
    ("reinforce", {}),
    ("sft", {}),
    ("grpo", {"clip_low": 0.2, "clip_high": 0.2, "normalizer": "constant", "constant_tokens": 11}),
    ("dapo", {"clip_low": 0.2, "clip_high": 0.28}),
    ("m2po", {"second_moment": 0.04}),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("name", "options"), BASES)
def test_penalty_agrees_with_the_written_out_loss(name, options, estimator):
    objective = penalize_kl(build_objective(name, **options), COEF, estimator)
    check_twin(objective, name, kl=(COEF, estimator), **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("base", ["asympo", "m2po"])
def test_layout_changes_nothing(base, estimator):
    objective = penalize_kl(build_objective(base), COEF, estimator)
    check_permutation(objective)
    check_partition(objective)
    check_masked(objective)
    case = make_case(5)
    for cut in context_cuts(case, 2):
        check_context(run_threads(context_rank, 2, objective, case, cut), objective, case)


# ---- what the estimators are unbiased for --------------------------------------------------------------------------


def policy(theta):
    """log-probs of every response of two tokens over three letters: the second letter depends on the first."""
    first, second = theta[0].log_softmax(-1), theta[1:].log_softmax(-1)
    return {(a, b): torch.stack([first[a], second[a, b]]) for a, b in itertools.product(range(3), repeat=2)}


def expected_force(estimator, theta, reference):
    """Sum over all responses of pi(response) x gradient of the penalty, as the objective weighs it; 1 / l = 1 / 2."""
    grad = torch.zeros_like(theta)
    objective = KLPenalty(Reinforce(), 1.0, estimator)
    for response in policy(theta):
        variable = theta.clone().requires_grad_()
        nll_T = -policy(variable)[response]
        batch = ResponseBatch(
            torch.tensor([0, 0]),
            torch.zeros(1, dtype=torch.float64),
            torch.tensor([2]),
            reference_logprob_T=policy(reference)[response],
        )
        weight_T, _ = objective.weigh(nll_T.detach(), batch)
        probability = float((-nll_T.detach()).sum().exp())
        grad += probability * torch.autograd.grad((weight_T * nll_T).sum(), variable)[0]
    return grad


def exact_divergence(estimator, theta, reference):
    """What the mean of the estimator's gradient is the gradient of."""
    ours, theirs = policy(theta), policy(reference)
    if estimator == "k1":  # whole responses
        return sum(ours[y].sum().exp() * (ours[y] - theirs[y]).sum() for y in ours) / 2
    # tokens: states as visited, held constant
    visits = torch.cat([torch.ones(1, dtype=torch.float64), theta[0].detach().softmax(-1)])
    log_p, log_q = theta.log_softmax(-1), reference.log_softmax(-1)
    if estimator == "k2":
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    return (visits * divergence).sum() / 2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_gradient_is_that_of_a_divergence(estimator):
    generator = torch.Generator().manual_seed(1)
    theta, reference = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    variable = theta.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(exact_divergence(estimator, variable, reference), variable)
    torch.testing.assert_close(expected_force(estimator, theta, reference), wanted, rtol=1e-12, atol=1e-12)
    for other in set(ESTIMATORS) - {estimator}:
        assert not torch.allclose(expected_force(other, theta, reference), wanted, atol=1e-2)


def test_k1_by_itself_would_regularise_nothing():
    """The derivative of k1 is -1 on every token, and the mean of that force over the policy is zero."""
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    total = torch.zeros_like(theta)
    for response in policy(theta):
        variable = theta.clone().requires_grad_()
        logp_T = policy(variable)[response]
        total += float(logp_T.detach().sum().exp()) * torch.autograd.grad(logp_T.sum(), variable)[0]
    assert total.abs().max() < 1e-15


def test_the_penalty_pulls_towards_the_reference():
    batch = ResponseBatch(
        torch.tensor([0, 0, -1]),
        torch.zeros(1),
        torch.tensor([2]),
        reference_logprob_T=torch.tensor([-2.0, -1.0, 5.0]),
    )
    for estimator in ("k2", "k3"):
        weight_T, _ = KLPenalty(Reinforce(), 1.0, estimator).weigh(torch.tensor([1.0, 2.0, 0.0]), batch)
        assert weight_T[0] < 0 < weight_T[1]  # likelier than the reference: its NLL is to grow; and the reverse
        assert weight_T[2] == 0
    k3_T, _ = KLPenalty(Reinforce(), 1.0).weigh(torch.tensor([1.0, 2.0, 0.0]), batch)
    assert k3_T.tolist() == pytest.approx([(math.exp(-1) - 1) / 2, (math.e - 1) / 2, 0])


# ---- mutants -------------------------------------------------------------------------------------------------------


class WrongSign(KLPenalty):
    def weigh(self, token_nll_T, batch, groups=SINGLE):
        weight_T, metrics = super().weigh(token_nll_T, batch, groups)
        plain_T, _ = self.objective.weigh(token_nll_T, batch, groups)
        return 2 * plain_T - weight_T, metrics


class ReferenceAndPolicySwapped(KLPenalty):
    def weigh(self, token_nll_T, batch, groups=SINGLE):
        _, metrics = super().weigh(token_nll_T, batch, groups)
        plain_T, _ = self.objective.weigh(token_nll_T, batch, groups)
        share_T = spread_to_tokens(self.objective.share(batch), batch.response_ids_T)
        gap_T = torch.where(batch.response_ids_T >= 0, batch.reference_logprob_T + token_nll_T, 0.0)
        return plain_T + self.coef * ((-gap_T).exp() - 1) * share_T, metrics


class OverPadding(KLPenalty):
    """Counts the penalty of every token, prompts and padding included."""

    def weigh(self, token_nll_T, batch, groups=SINGLE):
        everything = ResponseBatch(**{**vars(batch), "response_ids_T": batch.response_ids_T.clamp(min=0)})
        _, over = super().weigh(token_nll_T, everything, groups)
        weight_T, metrics = super().weigh(token_nll_T, batch, groups)
        return weight_T, {**metrics, "loss": over["loss"], "reference_kl": over["reference_kl"]}


class NotDividedByLength(KLPenalty):
    def weigh(self, token_nll_T, batch, groups=SINGLE):
        weight_T, metrics = super().weigh(token_nll_T, batch, groups)
        plain_T, _ = self.objective.weigh(token_nll_T, batch, groups)
        length_T = spread_to_tokens(batch.token_count_R.double(), batch.response_ids_T)
        return plain_T + (weight_T - plain_T) * length_T, metrics


@pytest.mark.parametrize("mutant", [WrongSign, ReferenceAndPolicySwapped, OverPadding, NotDividedByLength])
def test_mutants_of_k3(mutant):
    check_twin(KLPenalty(Reinforce(), COEF), "reinforce", kl=(COEF, "k3"))
    with pytest.raises(AssertionError):
        check_twin(mutant(Reinforce(), COEF), "reinforce", kl=(COEF, "k3"))


class ContextSumDropped(KLPenalty):
    def weigh(self, token_nll_T, batch, groups=SINGLE):
        return super().weigh(token_nll_T, batch, SINGLE)


def test_mutant_k1_of_the_own_tokens():
    """k1 weighs by a sum over the whole response, wherever its tokens lie."""
    case = make_case(5)
    cut = context_cuts(case, 2)[0]
    objective, mutant = KLPenalty(Reinforce(), COEF, "k1"), ContextSumDropped(Reinforce(), COEF, "k1")
    with pytest.raises(AssertionError):
        check_context(run_threads(context_rank, 2, mutant, case, cut), objective, case)


def test_zero_coefficient_is_no_penalty_and_needs_nothing():
    objective = build_objective("asympo")
    assert penalize_kl(objective, 0.0) is objective
    assert penalize_kl(objective, 0.1).needs == {"reference_logprob_T"}
    assert penalize_kl(build_objective("dapo"), 0.1).normalizer == "tokens"


def test_refusals():
    with pytest.raises(UnknownNameError, match="KL estimator 'k4'"):
        penalize_kl(Reinforce(), 0.1, "k4")
    with pytest.raises(ConfigError, match=r"coef is -0.1; .* at least 0"):
        penalize_kl(Reinforce(), -0.1)
    batch = ResponseBatch(torch.tensor([0]), torch.zeros(1), torch.tensor([1]))
    with pytest.raises(BatchError, match="needs reference_logprob_T"):
        penalize_kl(Reinforce(), 0.1)(torch.ones(1), batch)
