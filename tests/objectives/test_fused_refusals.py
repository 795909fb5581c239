"""What fused_objective_loss lets an objective read, and what it refuses."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from fused_cases import LENGTHS, OBJECTIVE_CASES, VOCAB, leaves_of, make_case
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import BatchError, ConfigError
from asympo_megatron.objectives import (
    OBJECTIVES,
    ASymPO,
    KLPenalty,
    Objective,
    build_objective,
    fused_objective_loss,
)
from asympo_megatron.parallel import SINGLE, ParallelGroups, Stat, token_nll
from asympo_megatron.testing.distributed import run_threads

pytestmark = pytest.mark.filterwarnings("ignore:normalizer='tokens'")


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
