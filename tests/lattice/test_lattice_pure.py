"""The part without Megatron in float64: token NLL, objectives and context parallelism agree to 1e-12 in any layout.

Ranks are threads with real gloo groups. The model is an embedding, a nonlinearity and an output weight, so no token
sees another and context parallelism needs no attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lattice_cells import MICROBATCHES, OPTIONS, PACKINGS, objective_names
from lattice_data import VOCAB, deal, global_batches, rectangle, rows_of
from torch import Tensor
from torch.distributed import HashStore, PrefixStore

from asympo_megatron.mcore import Layout
from asympo_megatron.mcore.collate import collate
from asympo_megatron.mcore.scoring import with_statistics
from asympo_megatron.objectives import Objective, build_objective
from asympo_megatron.parallel import SINGLE, ParallelGroups, token_nll
from asympo_megatron.testing.distributed import run_threads
from asympo_megatron.testing.gradients import relative_error

GOAL = 1e-12
HIDDEN = 8
PADDED_VOCAB = VOCAB + VOCAB % 2
HANG = timedelta(minutes=15)
"""Eight ranks share one interpreter, and a busy machine: only a rank that hangs takes so long."""


@dataclass(frozen=True)
class Grid:
    """Sizes; tensor parallelism varies fastest."""

    tensor: int
    context: int
    data: int

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.data

    def place(self, rank: int) -> tuple[int, int, int]:
        """Ranks inside the tensor, context and data dimension."""
        return rank % self.tensor, rank // self.tensor % self.context, rank // self.tensor // self.context


ONE = Grid(1, 1, 1)
FAST_GRID = Grid(2, 2, 1)
GRIDS = [Grid(1, 1, 2), Grid(2, 1, 1), Grid(1, 2, 1), Grid(1, 2, 2), Grid(1, 4, 1), Grid(2, 2, 2)]


def _weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    output = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    return embedding, torch.cat([output, output.new_zeros(PADDED_VOCAB - VOCAB, HIDDEN)])


def _groups(world: Any, grid: Grid, store: HashStore) -> ParallelGroups:
    tensor, context, data = grid.place(world.rank())

    def group(name: str, rank: int, size: int) -> Any:
        return dist.ProcessGroupGloo(PrefixStore(name, store), rank, size, HANG) if size > 1 else None

    return ParallelGroups(
        tensor=group(f"tensor {context} {data}", tensor, grid.tensor),
        context=group(f"context {tensor} {data}", context, grid.context),
        data_context=group(f"both {tensor}", data * grid.context + context, grid.data * grid.context),
    )


def _microbatches(grid: Grid, groups: ParallelGroups, rank: int, count: int, packing: str) -> Iterator[Any]:
    data = grid.place(rank)[2]
    unit = 2 * grid.context if grid.context > 1 else 1
    layout = Layout(groups, rank, grid.ranks, data, grid.data, unit, torch.device("cpu"))
    for step in global_batches(3):
        rows = rows_of(step)
        chosen = rectangle(rows, layout) if packing == "padded" else layout
        for microbatch in deal(rows, count, data, grid.data):
            yield collate(microbatch, chosen)


Case = tuple[str, int, str]
"""Objective, micro-batches, packing."""


def _objective(name: str) -> Objective:
    return build_objective(name, **OPTIONS.get(name, {}))


def _rank(world: Any, grid: Grid, store: HashStore, cases: list[Case], local_sums: bool) -> list[dict[str, Tensor]]:
    """One rank's share of gradients, loss and count for every case; three global batches taken as one."""
    groups = _groups(world, grid, store)
    results = []
    for name, count, packing in cases:
        objective = _objective(name)
        embedding, whole = _weights()
        embedding.requires_grad_()
        output = whole.chunk(grid.tensor)[groups.tensor_rank].clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        divisor = torch.zeros((), dtype=torch.int64)
        batches = list(_microbatches(grid, groups, world.rank(), count, packing))
        for batch in with_statistics(objective, batches, groups):
            hidden = torch.tanh(embedding[batch.tokens.squeeze(0)])
            nll = token_nll(hidden, output, batch.targets.squeeze(0), groups=groups, vocab_size=VOCAB)
            out = objective(nll, batch.responses, groups=SINGLE if local_sums else groups)
            out.loss_sum.backward()
            loss += out.loss_sum.detach()
            # The mutant differs in its sums alone, not in the divisor.
            divisor += objective.normalizer_count(batch.responses, groups) if local_sums else out.normalizer_count
        results.append({"embedding": embedding.grad, "output": output.grad, "loss": loss, "divisor": divisor})
    return results


def _run(grid: Grid, cases: list[Case], local_sums: bool = False) -> list[dict[str, Tensor]]:
    """The gradients of the whole model, divided once, as Megatron would."""
    ranks = run_threads(_rank, grid.ranks, grid, HashStore(), cases, local_sums, timeout_s=HANG.total_seconds())
    return [_join(grid, [rank[number] for rank in ranks]) for number in range(len(cases))]


def _join(grid: Grid, shares: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    # Loss and count are the same on all tensor-parallel ranks: one of them stands for all.
    first = [share for rank, share in enumerate(shares) if grid.place(rank)[0] == 0]
    divisor = torch.stack([share["divisor"] for share in first]).sum()
    output = [
        torch.stack([share["output"] for rank, share in enumerate(shares) if grid.place(rank)[0] == part]).sum(0)
        for part in range(grid.tensor)
    ]
    return {
        "embedding": torch.stack([share["embedding"] for share in shares]).sum(0) / divisor,
        "output": torch.cat(output) / divisor,
        "loss": torch.stack([share["loss"] for share in first]).sum() / divisor,
    }


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Tensor]]:
    names = objective_names()
    return dict(zip(names, _run(ONE, [(name, 1, "packed") for name in names]), strict=True))


@pytest.mark.parametrize("grid", [FAST_GRID, *(pytest.param(grid, marks=pytest.mark.slow) for grid in GRIDS)], ids=str)
def test_float64_gradients_do_not_depend_on_the_layout(references: dict[str, dict[str, Tensor]], grid: Grid) -> None:
    names = objective_names()
    cases: list[Case] = list(product(["asympo"] if grid == FAST_GRID else names, MICROBATCHES, PACKINGS))
    if grid == FAST_GRID:
        cases += [(name, 2, "packed") for name in names]
    for case, got in zip(cases, _run(grid, cases), strict=True):
        for name, wanted in references[case[0]].items():
            assert relative_error(got[name], wanted) <= GOAL, (case, name)


def test_sums_of_one_context_shard_are_noticed(references: dict[str, dict[str, Tensor]]) -> None:
    """Mutant: S of the local tokens instead of S of the response."""
    (got,) = _run(Grid(1, 2, 1), [("asympo", 1, "packed")], local_sums=True)
    assert relative_error(got["output"], references["asympo"]["output"]) > 0.1


@pytest.mark.parametrize("objective", objective_names())
def test_objectives_send_numbers_per_response_over_context_parallelism_never_tokens(
    monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    sent: list[int] = []
    all_reduce = dist.all_reduce

    worlds: list[Any] = []

    def counting(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group in worlds:
            sent.append(tensor.numel())
        return all_reduce(tensor, *args, group=group, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", counting)
    rows = rows_of(global_batches(1)[0])

    def rank(world: Any) -> int:
        worlds.append(world)
        groups = ParallelGroups(context=world)
        layout = Layout(groups, world.rank(), 2, 0, 1, 4, torch.device("cpu"))
        chosen = _objective(objective)
        (batch,) = with_statistics(chosen, [collate(rows, layout)], groups)
        chosen(torch.rand(batch.responses.response_ids_T.numel()), batch.responses, groups=groups)
        return batch.responses.response_ids_T.numel()

    tokens = run_threads(rank, 2)
    per_rank = sum(sent) / 2
    assert per_rank <= 4 * len(rows) < tokens[0]
    assert per_rank > 0 or objective != "asympo", "S of a response is summed over its shards"


def test_single_groups_are_what_one_rank_uses() -> None:
    assert _groups(_World(), ONE, HashStore()) == SINGLE


class _World:
    def rank(self) -> int:
        return 0
