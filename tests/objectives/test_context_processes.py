"""The same context-parallel checks in real processes, one start-up per world size."""

import pytest
import torch
import torch.distributed as dist
from objective_checks import check_context, context_cuts, context_rank, make_case

from asympo_megatron.objectives import GRPO, SFT, SPO, ASymPO, Reinforce
from asympo_megatron.parallel import zigzag_index
from asympo_megatron.testing.distributed import run_distributed

OBJECTIVES = (ASymPO(), ASymPO(nll_floor=0.7), SPO(), Reinforce(), GRPO(), SFT())


def cuts(case, size):
    starts = torch.tensor([0, 2 * size, len(case.ids_T) // (2 * size) * 2 * size])
    tail = torch.arange(int(starts[-1]), len(case.ids_T))
    zigzag = [zigzag_index(starts, size, rank) for rank in range(size)]
    return [*context_cuts(case, size), [torch.cat([zigzag[0], tail]), *zigzag[1:]]]


def all_cases(rank):
    case = make_case(5)
    return [
        context_rank(dist.group.WORLD, objective, case, cut)
        for objective in OBJECTIVES
        for cut in cuts(case, dist.get_world_size())
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_processes(size):
    per_rank = run_distributed(all_cases, size)
    case = make_case(5)
    number = 0
    for objective in OBJECTIVES:
        for _ in cuts(case, size):
            check_context([results[number] for results in per_rank], objective, case)
            number += 1
    assert number == len(per_rank[0]) == 24
