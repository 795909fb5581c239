"""Batches for fused_objective_loss, and its parity with token_nll and the objective."""

from dataclasses import dataclass, replace

import torch
from objective_cases import ALL
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives import (
    KLPenalty,
    Objective,
    build_objective,
    fused_objective_loss,
)
from asympo_megatron.parallel import token_nll

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
