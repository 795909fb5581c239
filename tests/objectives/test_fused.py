"""fused_objective_loss against token_nll and the objective: loss, metrics, both gradients; what it refuses; mutants."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from objective_cases import ALL
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import BatchError, ConfigError
from asympo_megatron.objectives import (
    OBJECTIVES,
    ASymPO,
    KLPenalty,
    Objective,
    Reinforce,
    build_objective,
    fused,
    fused_objective_loss,
)
from asympo_megatron.parallel import SINGLE, ParallelGroups, Stat, token_nll
from asympo_megatron.testing.distributed import run_threads

pytestmark = pytest.mark.filterwarnings("ignore:normalizer='tokens'")

VOCAB, PADDED, HIDDEN = 17, 22, 6
LENGTHS = (3, 1, 0, 9, 5, 1, 12)
CHUNKS = (4, 10, None)
"""Tokens: shorter than most responses; several short responses; the default, which holds all."""

OBJECTIVE_CASES = [
    *((f"{name}-{number}", build_objective(name, **options)) for number, (name, options) in enumerate(ALL)),
    *(
        (f"{name}+{estimator}", KLPenalty(build_objective(name), 0.3, estimator))
        for name in ("asympo", "grpo", "reinforce")
        for estimator in ("k1", "k2", "k3")
    ),
]


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    batch: ResponseBatch
    options: dict

    def cast(self, dtype: torch.dtype) -> "Case":
        names = ("advantage_R", "behavior_logprob_T", "proximal_logprob_T", "reference_logprob_T")
        batch = replace(self.batch, **{name: getattr(self.batch, name).to(dtype) for name in names})
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), batch=batch)


def make_case(objective: Objective, lengths=LENGTHS, seed=0, temperature=0.7) -> Case:
    """Responses in reversed order of their rows, with prompts and tool tokens between and inside of them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = [-1]
    for row, length in reversed(list(enumerate(lengths))):
        ids += [row] * (length // 2) + [-1] * (row % 3) + [row] * (length - length // 2)
    ids_T = torch.tensor([*ids, -1, -1])
    tokens, trained_T = len(ids_T), ids_T >= 0
    hidden, weight = 0.3 * normal(tokens, HIDDEN), normal(PADDED, HIDDEN)
    weight[VOCAB:] = 1e6
    target = torch.randint(0, VOCAB, (tokens,), generator=generator)
    options = {"temperature": temperature, "vocab_size": VOCAB}
    logprob_T = -token_nll(hidden, weight, target, **options)
    drifted = [logprob_T + size * normal(tokens) for size in (0.1, 0.05, 0.4)]
    for values_T in (*drifted, hidden):
        values_T[~trained_T] = torch.nan
    batch = ResponseBatch(ids_T, normal(len(lengths)), torch.tensor(lengths, dtype=torch.long), *drifted)
    target[~trained_T] = -100
    return Case(hidden, weight, target, replace(batch, statistics=objective.statistics([batch])), options)


def gradients_of(out, case, leaves, factor=1 / 7):
    hidden, weight = leaves
    (factor * out.loss_sum).backward()
    trained_T = case.batch.response_ids_T >= 0
    # The two paths differ at untrained tokens: here they hold NaN, and token_nll reads them.
    return out.loss_sum.detach(), torch.where(trained_T[:, None], hidden.grad, 0.0), weight.grad, out


def leaves_of(case):
    return case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()


def in_two(objective, case):
    clean = torch.where((case.batch.response_ids_T >= 0)[:, None], case.hidden, 0.0)
    leaves = leaves_of(replace(case, hidden=clean))
    return gradients_of(objective(token_nll(*leaves, case.target, **case.options), case.batch), case, leaves)


def in_one(objective, case, chunk):
    leaves = leaves_of(case)
    out = fused_objective_loss(*leaves, case.target, case.batch, objective, chunk_tokens=chunk, **case.options)
    found = gradients_of(out, case, leaves)
    assert torch.equal(found[1], leaves[0].grad)  # exactly 0 at untrained tokens
    return found


def check_parity(objective, case, chunk, tolerance=1e-12):
    want, got = in_two(objective, case), in_one(objective, case, chunk)
    for left, right in zip(got[:3], want[:3], strict=True):
        assert left.dtype == right.dtype
        assert (left - right).norm() <= tolerance * right.norm()
    assert torch.equal(got[3].normalizer_count, want[3].normalizer_count)
    assert got[3].metrics.keys() == want[3].metrics.keys()
    for name, stat in want[3].metrics.items():
        assert got[3].metrics[name].kind == stat.kind
        torch.testing.assert_close(got[3].metrics[name].values_K, stat.values_K, rtol=tolerance, atol=tolerance)


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


# ---- what an objective may read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [case[1] for case in OBJECTIVE_CASES], ids=[case[0] for case in OBJECTIVE_CASES])
def test_every_objective_weighs_by_what_it_declares(objective):
    """One NLL is moved: weights of other responses stay, and those of other tokens where the scope is the token."""
    case = make_case(objective)
    clean = torch.where((case.batch.response_ids_T >= 0)[:, None], case.hidden, 0.0)
    nll_T = token_nll(clean, case.weight, case.target, **case.options)
    ids_T = case.batch.response_ids_T
    weight_T = objective.weigh(nll_T, case.batch)[0]
    same_in_response = all(
        torch.equal(weight_T[ids_T == row], weight_T[ids_T == row][:1].expand(length))
        for row, length in enumerate(LENGTHS)
    )
    moves_others = False
    for index in (ids_T >= 0).nonzero().squeeze(1).tolist():
        moved_T = nll_T.clone()
        moved_T[index] *= 1.5
        changed_T = (objective.weigh(moved_T, case.batch)[0] != weight_T) & (ids_T >= 0)
        assert not changed_T[ids_T != ids_T[index]].any()
        changed_T[index] = False
        moves_others |= bool(changed_T.any())
    if objective.weight_scope == "response":
        assert same_in_response
    elif objective.weight_scope == "token":
        assert not moves_others
    else:
        assert objective.weight_scope == "mixed"


def test_every_registered_objective_declares_its_scope():
    assert {name for name, kind in OBJECTIVES.items() if kind().weight_scope is None} == set()
    assert KLPenalty(ASymPO(), 0.1, "k1").weight_scope == "response"
    assert KLPenalty(ASymPO(), 0.1, "k3").weight_scope == "mixed"
    assert KLPenalty(Undeclared(), 0.1, "k3").weight_scope is None


@dataclass(frozen=True)
class Undeclared(Objective):
    name: ClassVar[str] = "undeclared"

    def weigh(self, token_nll_T: Tensor, batch: ResponseBatch, groups=SINGLE) -> tuple[Tensor, dict[str, Stat]]:
        return token_nll_T, {}


class Untrue(Undeclared):
    weight_scope: ClassVar[str] = "response"


def call(case, objective, **options):
    return fused_objective_loss(*leaves_of(case), case.target, case.batch, objective, **{**case.options, **options})


def test_objectives_that_it_cannot_take_are_refused_by_name():
    case = make_case(ASymPO())
    with pytest.raises(ConfigError, match=r"'undeclared' declares no weight_scope.*use token_nll"):
        call(case, Undeclared())
    with pytest.raises(ConfigError, match="'undeclared' declares weight_scope 'response' and weighs the tokens of one"):
        call(case, Untrue(), chunk_tokens=4)
    with pytest.raises(BatchError, match="objective 'grpo' needs behavior_logprob_T"):
        call(replace(case, batch=replace(case.batch, behavior_logprob_T=None)), build_objective("grpo"))


# ---- bad input -----------------------------------------------------------------------------------------------------


def refused_rank(group, kind):
    with pytest.raises(ConfigError, match=r"got \d tensor-parallel and \d context-parallel ranks.*Use token_nll"):
        call(make_case(ASymPO()), ASymPO(), groups=ParallelGroups(**{kind: group}))
    return True


@pytest.mark.parametrize("kind", ["tensor", "context"])
def test_split_vocabularies_and_responses_are_refused(kind):
    assert run_threads(refused_rank, 2, kind) == [True, True]


def test_bad_input_is_refused():
    case = make_case(ASymPO())
    ids_T = case.batch.response_ids_T.clone()
    last = int((ids_T == 6).nonzero()[-1])
    ids_T[last], ids_T[-1] = -1, 6
    with pytest.raises(BatchError, match="trained tokens of response 6 lie on both sides of another response's"):
        call(replace(case, batch=replace(case.batch, response_ids_T=ids_T), target=case.target.abs() % VOCAB), ASymPO())
    for wild in (-100, VOCAB):
        target = case.target.clone()
        target[last] = wild
        with pytest.raises(BatchError, match=f"target {wild} of a trained token is outside of the vocabulary of 17"):
            call(replace(case, target=target), ASymPO())
    with pytest.raises(BatchError, match="chunk_tokens is 0; it must be at least 1"):
        call(case, ASymPO(), chunk_tokens=0)
    with pytest.raises(BatchError, match="temperature is 0"):
        call(case, ASymPO(), temperature=0)
    with pytest.raises(BatchError, match=r"response_ids_T \(3,\)"):
        call(replace(case, batch=ResponseBatch(ids_T[:3], torch.ones(7), torch.ones(7, dtype=torch.long))), ASymPO())


def test_a_second_backward_is_refused():
    out = call(make_case(ASymPO()), ASymPO())
    out.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        out.loss_sum.backward()


# ---- mutants -------------------------------------------------------------------------------------------------------


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
