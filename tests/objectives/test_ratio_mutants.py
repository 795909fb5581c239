"""Objectives on probability ratios: a mutant of each formula that its slow twin must catch; statistics of the batch."""

import pytest
import torch
from objective_cases import ALL, CLIP
from objective_checks import (
    Case,
    check_context,
    check_partition,
    check_twin,
    context_cuts,
    context_rank,
    make_case,
    single,
)

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import BatchError
from asympo_megatron.objectives import (
    CISPO,
    GRPO,
    GSPO,
    M2PO,
    MIS,
    OPMD,
    SAPO,
    TIS,
    TOPR,
    VESPO,
    AsymRE,
    DecoupledPPO,
    DrGRPO,
    IcePop,
    build_objective,
)
from asympo_megatron.objectives.ratio import MAX_LOG_RATIO, Terms, advantages, ratio_of, response_log_ratio
from asympo_megatron.parallel import SINGLE, reduce_stats, spread_to_tokens
from asympo_megatron.testing.distributed import run_threads

pytestmark = pytest.mark.filterwarnings("ignore:normalizer='tokens'")


class OwnLength(DrGRPO):
    def share(self, batch):
        return torch.where(batch.token_count_R > 0, 1 / batch.token_count_R.clamp(min=1), 0.0)


class SumForMean(GSPO):
    def terms(self, log_ratio_T, token_nll_T, batch, groups):
        count_T = spread_to_tokens(batch.token_count_R.double(), batch.response_ids_T)
        return super().terms(log_ratio_T * count_T, token_nll_T, batch, groups)


class ForceOverLength(GSPO):
    """Forgets that every token of the response carries the derivative of the same ratio."""

    def terms(self, log_ratio_T, token_nll_T, batch, groups):
        found = super().terms(log_ratio_T, token_nll_T, batch, groups)
        return Terms(
            found.force_T / spread_to_tokens(batch.token_count_R.double(), batch.response_ids_T), found.value_T
        )


class ClippedTokensDropped(CISPO):
    def terms(self, log_ratio_T, token_nll_T, batch, groups):
        found = super().terms(log_ratio_T, token_nll_T, batch, groups)
        return Terms(torch.where(found.clipped_T, 0.0, found.force_T), found.value_T, found.clipped_T)


class GateNotDifferentiated(SAPO):
    def terms(self, log_ratio_T, token_nll_T, batch, groups):
        found = super().terms(log_ratio_T, token_nll_T, batch, groups)
        return Terms(-ratio_of(log_ratio_T) * found.value_T, found.value_T)


class SidesSwapped(SAPO):
    def terms(self, log_ratio_T, token_nll_T, batch, groups):
        swapped = SAPO(tau_pos=self.tau_neg, tau_neg=self.tau_pos)
        return swapped.terms(log_ratio_T, token_nll_T, batch, groups)


class LengthNormalized(VESPO):
    def terms(self, log_ratio_T, token_nll_T, batch, groups):
        mean_R = response_log_ratio(log_ratio_T, batch, groups) / batch.token_count_R.clamp(min=1) ** 2
        return super().terms(spread_to_tokens(mean_R, batch.response_ids_T), token_nll_T, batch, groups)


class PositivesTapered(TOPR):
    def terms(self, log_ratio_T, token_nll_T, batch, groups):
        taper_R = response_log_ratio(log_ratio_T, batch, groups).clamp(max=0).exp()
        force_T = spread_to_tokens(taper_R, batch.response_ids_T) * advantages(batch)
        return Terms(force_T, force_T * token_nll_T)


class SmallestDropped(M2PO):
    def terms(self, log_ratio_T, token_nll_T, batch, groups):
        squared_T, candidate_T = self._candidates(batch)
        dropped_T = candidate_T & (squared_T <= batch.statistic("m2_bound"))
        force_T = torch.where(dropped_T, 0.0, ratio_of(log_ratio_T) * advantages(batch))
        return Terms(force_T, -force_T, dropped_T)


class DroppedLeaveTheDivisor(M2PO):
    def normalizer_count(self, batch, groups=SINGLE):
        squared_T, candidate_T = self._candidates(batch)
        kept_T = ~(candidate_T & (squared_T > batch.statistic("m2_bound")))
        return ((batch.response_ids_T >= 0) & kept_T).sum()


class WeightForgotten(DecoupledPPO):
    def correction(self, log_weight_T, batch, groups):
        return torch.ones_like(log_weight_T)


class WeightInverted(DecoupledPPO):
    def correction(self, log_weight_T, batch, groups):
        return super().correction(-log_weight_T, batch, groups)


class ClampedNotMasked(IcePop):
    def correction(self, log_weight_T, batch, groups):
        return ratio_of(log_weight_T).clamp(self.weight_min, self.weight_max)


class TruncatedNotRejected(MIS):
    def correction(self, log_weight_T, batch, groups):
        weight_R = ratio_of(response_log_ratio(log_weight_T, batch, groups)).clamp(max=self.weight_max)
        return spread_to_tokens(weight_R, batch.response_ids_T)


class ShiftedUp(AsymRE):
    def coefficient(self, advantage_R):
        return advantage_R + self.delta


class Multiplied(OPMD):
    def coefficient(self, advantage_R):
        return advantage_R * (1 + self.tau)


def options_of(name):
    return next(options for found, options in ALL if found == name)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("dapo", GRPO),
        ("dr_grpo", OwnLength),
        ("gspo", SumForMean),
        ("gspo", ForceOverLength),
        ("gspo", GRPO),
        ("cispo", ClippedTokensDropped),
        ("sapo", GateNotDifferentiated),
        ("sapo", SidesSwapped),
        ("vespo", LengthNormalized),
        ("topr", PositivesTapered),
        ("m2po", SmallestDropped),
        ("m2po", DroppedLeaveTheDivisor),
        ("decoupled_ppo", WeightForgotten),
        ("decoupled_ppo", WeightInverted),
        ("icepop", ClampedNotMasked),
        ("mis", TruncatedNotRejected),
        ("asymre", ShiftedUp),
        ("opmd", Multiplied),
    ],
)
def test_mutant_of_the_formula(name, mutant):
    options = options_of(name)
    check_twin(build_objective(name, **options), name, **options)
    with pytest.raises(AssertionError):
        check_twin(mutant(**options), name, **options)


def test_variants_of_the_correction_are_told_apart():
    """TIS without its bound is decoupled PPO; MIS by product and by mean differ; M2PO by candidates differs."""
    with pytest.raises(AssertionError):
        check_twin(DecoupledPPO(**CLIP), "tis", **CLIP, weight_max=1.2)
    with pytest.raises(AssertionError):
        check_twin(MIS(**CLIP, weight_max=1.1), "mis", **CLIP, weight_max=1.1, geometric=True)
    with pytest.raises(AssertionError):
        check_twin(M2PO(), "m2po", all_tokens=True)
    with pytest.raises(AssertionError):
        check_twin(GRPO(**CLIP), "grpo", **CLIP, old_logprobs="recompute")


@pytest.mark.parametrize(
    ("name", "options"), [case for case in ALL if "clip" in str(case) or case[0] in ("m2po", "mis")]
)
def test_cases_reach_both_branches(name, options):
    """In the random cases some tokens are held back and some are not."""
    for seed in range(3):
        assert 0 < single(build_objective(name, **options), make_case(seed)).metrics["clip_fraction"] < 1


def test_bounds_of_single_tokens():
    """Ratios 0.4, 1 and 7 of one response with A = 1: what each correction makes of them."""
    log_weight_T = torch.tensor([0.4, 1.0, 7.0], dtype=torch.float64).log()
    batch = ResponseBatch(
        torch.tensor([0, 0, 0]),
        torch.tensor([1.0], dtype=torch.float64),
        torch.tensor([3]),
        behavior_logprob_T=-1 - log_weight_T,
        proximal_logprob_T=-torch.ones(3, dtype=torch.float64),
    )
    nll_T = torch.ones(3, dtype=torch.float64)
    for objective, wanted in (
        (DecoupledPPO(), [0.4, 1, 7]),
        (TIS(weight_max=2), [0.4, 1, 2]),
        (IcePop(weight_min=0.5, weight_max=5), [0, 1, 0]),
        (MIS(weight_max=2), [0, 0, 0]),  # the product is 2.8
        (MIS(weight_max=3), [2.8] * 3),
        (MIS(weight_max=2, geometric=True), [2.8 ** (1 / 3)] * 3),
    ):
        weight_T, metrics = objective.weigh(nll_T, batch)
        assert (3 * weight_T).tolist() == pytest.approx(wanted)
        assert reduce_stats(metrics, None)["clip_fraction"] == pytest.approx(wanted.count(0) / 3)


def test_on_policy_all_gates_are_open():
    """r = 1: every objective on advantages alone has the weight A / l, whatever its gate."""
    case = make_case(4)
    logprob_T = -case.nll()
    on_policy = Case(**{**vars(case), "behavior_T": logprob_T, "proximal_T": logprob_T})
    for name in ("grpo", "gspo", "cispo", "sapo", "vespo", "topr", "m2po", "decoupled_ppo", "tis", "icepop", "mis"):
        objective = build_objective(name)
        batch = on_policy.batch()
        statistics = objective.statistics([batch])
        weight_T, _ = objective.weigh(case.nll(), ResponseBatch(**{**vars(batch), "statistics": statistics}))
        wanted_T = spread_to_tokens(case.advantage_R * objective.share(batch), case.ids_T)
        torch.testing.assert_close(weight_T, wanted_T, rtol=1e-12, atol=1e-12)


def test_unrelated_policies_overflow_nowhere():
    batch = ResponseBatch(
        torch.tensor([0, 1]),
        torch.tensor([1.0, -1.0]),
        torch.tensor([1, 1]),
        behavior_logprob_T=torch.tensor([-500.0, -500.0]),
        proximal_logprob_T=torch.tensor([0.0, -1000.0]),
        statistics={"m2_bound": torch.tensor(1e6)},
    )
    for name in sorted({name for name, _ in ALL}):
        weight_T, metrics = build_objective(name).weigh(torch.tensor([0.0, 1000.0]), batch)
        assert weight_T.isfinite().all(), name
        assert weight_T.abs().max() <= torch.tensor(2 * MAX_LOG_RATIO).exp()
        assert all(stat.values_K.isfinite().all() or stat.kind in ("max", "min") for stat in metrics.values())


# ---- statistics of the whole batch ---------------------------------------------------------------------------------


class FirstMicroBatchOnly(M2PO):
    def statistics(self, batches, groups=SINGLE):
        return super().statistics(batches[:1], groups)


class OwnRankOnly(M2PO):
    def statistics(self, batches, groups=SINGLE):
        return super().statistics(batches, SINGLE)


def test_mutant_statistic_of_one_micro_batch():
    with pytest.raises(AssertionError):
        check_partition(FirstMicroBatchOnly())


def test_mutant_statistic_of_one_rank():
    case = make_case(5)
    cut = context_cuts(case, 2)[0]
    with pytest.raises(AssertionError):
        check_context(run_threads(context_rank, 2, OwnRankOnly(), case, cut), M2PO(), case)


def test_a_statistic_is_never_made_up():
    with pytest.raises(BatchError, match=r"no statistic 'm2_bound' of the whole global batch.*objective.statistics"):
        M2PO().weigh(make_case(0).nll(), make_case(0).batch())
