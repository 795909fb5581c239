"""Cases, slow twins and checks that every objective must pass and every mutant must fail.

A check raises AssertionError. The model behind the NLLs is tiny but has shared parameters, as a network does:
nll_t = softplus(features_t . theta), all in float64.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from published_losses import published_loss
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives import Objective
from asympo_megatron.parallel import SINGLE, ParallelGroups, merge_stats, reduce_stats

STEP = 1e-5
"""Of the central differences: error about STEP^2 + 1e-16 / STEP."""


@dataclass(frozen=True)
class Case:
    """Some responses; tokens may be reordered, cut into micro-batches or spread over ranks."""

    theta: Tensor
    features_TD: Tensor
    ids_T: Tensor
    advantage_R: Tensor
    count_R: Tensor
    behavior_T: Tensor
    proximal_T: Tensor
    reference_T: Tensor
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def nll(self, theta: Tensor | None = None) -> Tensor:
        return F.softplus(self.features_TD @ (self.theta if theta is None else theta))

    def batch(self) -> ResponseBatch:
        return ResponseBatch(
            self.ids_T,
            self.advantage_R,
            self.count_R,
            self.behavior_T,
            self.proximal_T,
            self.reference_T,
            self.statistics,
        )

    def take(self, index_T: Tensor) -> "Case":
        """Some of the tokens (of one rank), in the given order; responses and their counts stay whole."""
        return replace(
            self,
            features_TD=self.features_TD[index_T],
            ids_T=self.ids_T[index_T],
            behavior_T=self.behavior_T[index_T],
            proximal_T=self.proximal_T[index_T],
            reference_T=self.reference_T[index_T],
        )

    def rows(self, rows: list[int]) -> "Case":
        """A micro-batch of some responses, renumbered."""
        position = {row: new for new, row in enumerate(rows)}
        keep = torch.tensor([t for t, row in enumerate(self.ids_T.tolist()) if row in position], dtype=torch.long)
        part = self.take(keep)
        ids_T = torch.tensor([position[row] for row in part.ids_T.tolist()], dtype=torch.long)
        select = torch.tensor(rows, dtype=torch.long)
        return replace(part, ids_T=ids_T, advantage_R=self.advantage_R[select], count_R=self.count_R[select])


def make_case(seed: int = 0, responses: int = 7, dim: int = 5) -> Case:
    """Random responses of 1 to 9 tokens with padding in between; row 2 is masked out, row 4 has advantage 0."""
    generator = torch.Generator().manual_seed(seed)
    count_R = torch.randint(1, 10, (responses,), generator=generator)
    count_R[1] = 1
    count_R[2] = 0
    ids = [row for row in range(responses) for _ in range(int(count_R[row]))] + [-1] * 6
    order = torch.randperm(len(ids), generator=generator)
    advantage_R = torch.randn(responses, generator=generator, dtype=torch.float64)
    advantage_R[4] = 0
    advantage_R -= advantage_R.mean() * (advantage_R != 0) * responses / (responses - 1)
    case = Case(
        theta=torch.randn(dim, generator=generator, dtype=torch.float64),
        features_TD=torch.randn(len(ids), dim, generator=generator, dtype=torch.float64),
        ids_T=torch.tensor(ids)[order],
        advantage_R=advantage_R,
        count_R=count_R,
        behavior_T=torch.zeros(0),
        proximal_T=torch.zeros(0),
        reference_T=torch.zeros(0),
    )
    # log-probs of policies that have drifted apart; what stands at untrained tokens is nonsense
    noise_3T = torch.randn(3, len(ids), generator=generator, dtype=torch.float64)
    logprob_3T = -case.nll() + torch.tensor([[0.4], [0.2], [0.5]]) * noise_3T
    logprob_3T[:, case.ids_T < 0] = 1e3
    return replace(case, **dict(zip(("behavior_T", "proximal_T", "reference_T"), logprob_3T, strict=True)))


@dataclass(frozen=True)
class Result:
    """Gradient and metrics of the global batch, put together the way Megatron does."""

    grad: Tensor
    metrics: dict[str, float]
    normalizer: int


def run(objective: Objective, parts: list[tuple[Case, ParallelGroups]]) -> Result:
    """Add loss sums and counts of micro-batches (and ranks), then divide once."""
    grad = torch.zeros_like(parts[0][0].theta)
    outputs = []
    statistics = objective.statistics([case.batch() for case, _ in parts])
    for case, groups in parts:
        case = replace(case, statistics=statistics)
        theta = case.theta.clone().requires_grad_()
        out = objective(case.nll(theta), case.batch(), groups)
        grad += torch.autograd.grad(out.loss_sum, theta)[0]
        outputs.append(out)
    count = sum(int(out.normalizer_count) for out in outputs)
    metrics = reduce_stats(merge_stats(dict(out.metrics) for out in outputs), None)
    return Result(grad / count, metrics, count)


def single(objective: Objective, case: Case) -> Result:
    return run(objective, [(case, SINGLE)])


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def same_metrics(got: dict[str, float], want: dict[str, float]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert math.isclose(got[name], value, rel_tol=1e-12, abs_tol=1e-12) or (
            value != value and got[name] != got[name]
        ), (
            name,
            got[name],
            value,
        )


# ---- slow twins: plain loops over responses and tokens -------------------------------------------------------------


def twin_J(case: Case, theta: Tensor) -> float:
    """J = (1/N) sum_i A_i log n_i in a plain loop."""
    nll = case.nll(theta).tolist()
    value = 0.0
    for row, advantage in enumerate(case.advantage_R.tolist()):
        own = [nll[t] for t, owner in enumerate(case.ids_T.tolist()) if owner == row]
        if own:
            value += advantage * math.log(math.fsum(own) / len(own))
    return value / len(case.advantage_R)


def central_difference(fn, theta: Tensor) -> Tensor:
    grad = torch.zeros_like(theta)
    for index in range(theta.numel()):
        step = torch.zeros_like(theta)
        step[index] = STEP
        grad[index] = (float(fn(theta + step)) - float(fn(theta - step))) / (2 * STEP)
    return grad


# ---- checks --------------------------------------------------------------------------------------------------------


def check_twin(objective: Objective, name: str, **options: float) -> None:
    """Gradient, reported loss and divisor agree with the published loss in plain loops."""
    for seed in range(3):
        case = make_case(seed)
        theta = case.theta.clone().requires_grad_()
        loss = published_loss(name, case, theta, **options)
        result = single(objective, case)
        close(result.grad, torch.autograd.grad(loss, theta)[0])
        assert math.isclose(result.metrics["loss"], float(loss.detach()), rel_tol=1e-12, abs_tol=1e-12)


def check_frozen_weights(objective: Objective) -> None:
    """The gradient is that of (frozen weight x nll), by finite differences."""
    case = make_case(3)
    case = replace(case, statistics=objective.statistics([case.batch()]))
    weight_T, _ = objective.weigh(case.nll(), case.batch(), SINGLE)
    frozen_T = torch.where(case.ids_T >= 0, weight_T, 0.0)
    result = single(objective, case)
    numeric = central_difference(lambda theta: (frozen_T * case.nll(theta)).sum(), case.theta) / result.normalizer
    close(result.grad, numeric, 1e-8)
    assert result.grad.abs().max() > 1e-3


def check_gradient_of_J(objective: Objective) -> None:
    """ASymPO above the floor: the gradient is that of J, by finite differences, and J is what is reported."""
    for seed in range(3):
        case = make_case(seed)
        result = single(objective, case)
        close(result.grad, central_difference(lambda theta, case=case: twin_J(case, theta), case.theta), 1e-8)
        assert math.isclose(result.metrics["J"], twin_J(case, case.theta), rel_tol=1e-12)


def check_permutation(objective: Objective) -> None:
    """Order of tokens, and padding between them, change nothing."""
    case = make_case(1)
    want = single(objective, case)
    order = torch.randperm(len(case.ids_T), generator=torch.Generator().manual_seed(9))
    trained = order[case.ids_T[order] >= 0]
    for index in (order, order.flip(0), trained):
        got = single(objective, case.take(index))
        close(got.grad, want.grad)
        same_metrics(got.metrics, want.metrics)


def check_partition(objective: Objective) -> None:
    """Cutting the batch into micro-batches, unequal and empty ones included, changes nothing."""
    case = make_case(2, responses=8)
    want = single(objective, case)
    for cut in ([[0, 1, 2, 3, 4], [5, 6, 7]], [[7, 0], [6, 1, 5], [], [2], [4, 3]], [[row] for row in range(8)]):
        got = run(objective, [(case.rows(rows), SINGLE) for rows in cut])
        close(got.grad, want.grad)
        same_metrics(got.metrics, want.metrics)
        assert got.normalizer == want.normalizer


def context_rank(group, objective: Objective, case: Case, cut: list[Tensor]) -> tuple[Tensor, int, dict[str, float]]:
    """What one context-parallel rank does; ``cut[r]`` are the tokens of rank r."""
    groups = ParallelGroups(context=group, data_context=group)
    theta = case.theta.clone().requires_grad_()
    local = case.take(cut[group.rank()])
    local = replace(local, statistics=objective.statistics([local.batch()], groups))
    out = objective(local.nll(theta), local.batch(), groups)
    grad = torch.autograd.grad(out.loss_sum, theta)[0]
    return grad, int(out.normalizer_count), reduce_stats(dict(out.metrics), group)


def context_cuts(case: Case, size: int) -> list[list[Tensor]]:
    """Ways to spread the tokens over ranks: at random, contiguous, all on the last rank."""
    tokens = len(case.ids_T)
    owner = torch.randint(0, size, (tokens,), generator=torch.Generator().manual_seed(size))
    everything = torch.arange(tokens)
    return [
        [(owner == rank).nonzero().squeeze(1) for rank in range(size)],
        list(everything.tensor_split(size)),
        [everything[:0]] * (size - 1) + [everything],
    ]


def check_context(results, objective: Objective, case: Case) -> None:
    """Summed over the ranks, gradient and count are those of one rank; metrics are equal everywhere."""
    want = single(objective, case)
    count = sum(part[1] for part in results)
    assert count == want.normalizer
    close(sum(part[0] for part in results) / count, want.grad)
    for part in results:
        same_metrics(part[2], want.metrics)


def check_masked(objective: Objective) -> None:
    """A response without trained tokens adds nothing to the loss, stays in N, and nothing becomes NaN."""
    nll_T = torch.tensor([0.5, math.inf, math.nan], dtype=torch.float64, requires_grad=True)
    logprob_T = torch.tensor([-0.5, math.nan, -math.inf], dtype=torch.float64)
    batch = ResponseBatch(
        torch.tensor([0, -1, -1]),
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        torch.tensor([1, 0]),
        behavior_logprob_T=logprob_T,
        proximal_logprob_T=logprob_T,
        reference_logprob_T=logprob_T - 0.1,
    )
    batch = replace(batch, statistics=objective.statistics([batch]))
    out = objective(nll_T, batch, SINGLE)
    grad = torch.autograd.grad(out.loss_sum, nll_T)[0]
    assert int(out.normalizer_count) == (1 if objective.normalizer == "tokens" else 2)
    assert math.isfinite(float(out.loss_sum.detach()))
    assert grad[1:].tolist() == [0.0, 0.0]
    assert 0 < float(grad[0]) < math.inf
    metrics = reduce_stats(dict(out.metrics), None)
    assert metrics["responses"] == 2
    assert metrics["untrained_responses"] == 1
    assert math.isfinite(metrics["J"])
