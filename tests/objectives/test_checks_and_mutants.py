"""Every objective passes every check; every mutant fails the check that is there for it."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from objective_cases import ALL
from objective_checks import (
    check_context,
    check_frozen_weights,
    check_gradient_of_J,
    check_masked,
    check_partition,
    check_permutation,
    check_twin,
    close,
    context_cuts,
    context_rank,
    make_case,
    single,
)

from asympo_megatron.batch import ObjectiveOutput
from asympo_megatron.objectives import GRPO, SFT, SPO, ASymPO, Reinforce, build_objective
from asympo_megatron.parallel import SINGLE, spread_to_tokens
from asympo_megatron.testing.distributed import run_threads

pytestmark = pytest.mark.filterwarnings("ignore:normalizer='tokens'")


@pytest.mark.parametrize(("name", "options"), ALL)
def test_every_objective_agrees_with_its_published_loss(name, options):
    check_twin(build_objective(name, **options), name, **options)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_every_objective_is_the_gradient_of_frozen_weights(name, options):
    check_frozen_weights(build_objective(name, **options))


def test_asympo_is_the_gradient_of_J():
    check_gradient_of_J(ASymPO())


@pytest.mark.parametrize(("name", "options"), ALL)
def test_layout_changes_nothing(name, options):
    objective = build_objective(name, **options)
    check_permutation(objective)
    check_partition(objective)
    check_masked(objective)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("name", "options"), ALL)
def test_context_parallel_ranks_add_up_to_one(name, options, size):
    objective, case = build_objective(name, **options), make_case(5)
    for cut in context_cuts(case, size):
        check_context(run_threads(context_rank, size, objective, case, cut), objective, case)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_asympo_sees_no_scale_of_the_nll(factor):
    case = make_case(6)
    nll_T = case.nll()
    weight_T, _ = ASymPO(nll_floor=1e-9).weigh(nll_T, case.batch())
    scaled_T, _ = ASymPO(nll_floor=1e-9).weigh(factor * nll_T, case.batch())
    # The weight absorbs the factor, so weight x gradient of the scaled NLL is unchanged.
    close(factor * scaled_T, weight_T)


def test_asympo_sees_no_length():
    """A response of k copies of its tokens has the same loss and gradient: token mean equals token sum."""
    case = make_case(7)
    double = case.take(torch.arange(len(case.ids_T)).repeat(3))
    close(single(ASymPO(), replace(double, count_R=3 * case.count_R)).grad, single(ASymPO(), case).grad)


# ---- mutants -------------------------------------------------------------------------------------------------------


class WeightNotDetached(ASymPO):
    def __call__(self, token_nll_T, batch, groups=SINGLE):
        out = super().__call__(token_nll_T, batch, groups)
        kept = batch.response_ids_T >= 0
        total_R = torch.zeros_like(batch.advantage_R).index_add(0, batch.response_ids_T[kept], token_nll_T[kept])
        weight_R = torch.where(batch.token_count_R > 0, batch.advantage_R / total_R.clamp(min=1e-12), 0.0)
        loss = (spread_to_tokens(weight_R, batch.response_ids_T) * token_nll_T).sum()
        return ObjectiveOutput(loss, out.normalizer_count, out.metrics)


def test_mutant_weight_not_detached():
    with pytest.raises(AssertionError):
        check_gradient_of_J(WeightNotDetached())
    with pytest.raises(AssertionError):
        check_twin(WeightNotDetached(), "asympo", nll_floor=1e-3)
    case = make_case(0)
    assert single(WeightNotDetached(), case).grad.abs().max() < 1e-15  # a forgotten detach trains nothing at all
    assert single(ASymPO(), case).grad.abs().max() > 1e-2


class ContextSumDropped(ASymPO):
    def weigh(self, token_nll_T, batch, groups=SINGLE):
        return super().weigh(token_nll_T, batch, SINGLE)


class CountedOnEveryContextRank(Reinforce):
    def normalizer_count(self, batch, groups=SINGLE):
        return super().normalizer_count(batch, SINGLE)


@pytest.mark.parametrize(("mutant", "base"), [(ContextSumDropped, ASymPO), (CountedOnEveryContextRank, Reinforce)])
def test_mutant_context_parallel(mutant, base):
    case = make_case(5)
    cut = context_cuts(case, 2)[0]
    check_context(run_threads(context_rank, 2, base(), case, cut), base(), case)
    with pytest.raises(AssertionError):
        check_context(run_threads(context_rank, 2, mutant(), case, cut), base(), case)


class LocalDivision(Reinforce):
    """Mean of local means: every micro-batch divides by its own count."""

    def __call__(self, token_nll_T, batch, groups=SINGLE):
        out = super().__call__(token_nll_T, batch, groups)
        count = torch.clamp(out.normalizer_count, min=1)
        return ObjectiveOutput(out.loss_sum / count, torch.ones_like(count), out.metrics)


class MeanOfTokensInstead(SFT):
    """Mean of per-response means where the mean over all tokens is meant."""

    def weigh(self, token_nll_T, batch, groups=SINGLE):
        weight_T, metrics = super().weigh(token_nll_T, batch, groups)
        mean_R = batch.token_count_R.sum() / (batch.token_count_R.clamp(min=1) * max(batch.num_responses, 1))
        return weight_T * spread_to_tokens(mean_R.double(), batch.response_ids_T), metrics


def test_mutant_local_means():
    with pytest.raises(AssertionError):
        check_partition(LocalDivision())
    with pytest.raises(AssertionError):
        check_partition(MeanOfTokensInstead())


class MaskedResponseSkippedInN(ASymPO):
    def normalizer_count(self, batch, groups=SINGLE):
        return (batch.token_count_R > 0).sum()


class MultipliedByMask(ASymPO):
    def weigh(self, token_nll_T, batch, groups=SINGLE):
        weight_T, metrics = super().weigh(token_nll_T, batch, groups)
        mask_T = (batch.response_ids_T >= 0).double()
        self_made = (mask_T * token_nll_T).sum()
        return weight_T + 0 * self_made, metrics


class LossMultipliedByMask(ASymPO):
    def __call__(self, token_nll_T, batch, groups=SINGLE):
        out = super().__call__(token_nll_T, batch, groups)
        weight_T, _ = self.weigh(token_nll_T.detach(), batch, groups)
        return ObjectiveOutput((weight_T * token_nll_T).sum(), out.normalizer_count, out.metrics)


@pytest.mark.parametrize("mutant", [MaskedResponseSkippedInN, MultipliedByMask, LossMultipliedByMask])
def test_mutant_masks(mutant):
    with pytest.raises(AssertionError):
        check_masked(mutant())


class BranchInverted(GRPO):
    def weigh(self, token_nll_T, batch, groups=SINGLE):
        weight_T, metrics = super().weigh(token_nll_T, batch, groups)
        ratio_T = torch.where(batch.response_ids_T >= 0, (-token_nll_T - batch.behavior_logprob_T).exp(), 0.0)
        share_R = batch.advantage_R / batch.token_count_R.clamp(min=1)
        free_T = ratio_T * spread_to_tokens(share_R, batch.response_ids_T)
        return torch.where(weight_T != 0, 0.0, free_T), metrics


class ScaleOnTheWrongSign(SPO):
    def coefficient(self, advantage_R):
        return torch.where(advantage_R > 0, self.negative_scale * advantage_R, advantage_R)


@dataclass(frozen=True)
class NoFloor(ASymPO):
    def weigh(self, token_nll_T, batch, groups=SINGLE):
        return replace(self, nll_floor=1e-300).weigh_above(token_nll_T, batch, groups)

    def weigh_above(self, token_nll_T, batch, groups):
        return ASymPO.weigh(self, token_nll_T, batch, groups)


@pytest.mark.parametrize(
    ("mutant", "name", "options"),
    [
        (BranchInverted(clip_low=0.2, clip_high=0.28), "grpo", {"clip_low": 0.2, "clip_high": 0.28}),
        (ScaleOnTheWrongSign(negative_scale=0.25), "spo", {"negative_scale": 0.25}),
        (NoFloor(nll_floor=0.7), "asympo", {"nll_floor": 0.7}),
        (Reinforce(), "asympo", {"nll_floor": 1e-3}),
    ],
)
def test_mutant_of_the_formula(mutant, name, options):
    check_twin(build_objective(name, **options), name, **options)
    with pytest.raises(AssertionError):
        check_twin(mutant, name, **options)


def test_cases_reach_what_they_are_for():
    """The random cases contain floored and unfloored responses, clipped and free tokens of both signs."""
    case = make_case(0)
    metrics = single(ASymPO(nll_floor=0.7), case).metrics
    assert 0 < metrics["floored_fraction"] < 1
    assert metrics["untrained_responses"] == 1
    weight_T, _ = GRPO().weigh(case.nll(), case.batch())
    trained = case.ids_T >= 0
    signs = {
        (float(case.advantage_R[row]) > 0, float(weight) != 0)
        for row, weight in zip(case.ids_T[trained].tolist(), weight_T[trained].tolist(), strict=True)
        if case.advantage_R[row] != 0
    }
    assert signs == {(True, True), (True, False), (False, True), (False, False)}
    assert math.isclose(float(case.advantage_R.sum()), 0, abs_tol=1e-12)
