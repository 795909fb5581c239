"""The helpers that the other suites stand on: results in order, tracebacks, time-outs, no process left."""

import multiprocessing
import os
import threading

import pytest
import torch
import torch.distributed as dist

from asympo_megatron.parallel import ParallelGroups, token_nll
from asympo_megatron.testing.distributed import run_distributed, run_threads


def good(rank, offset):
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    return rank, dist.get_world_size(), float(total) + offset, shards()


def shards():
    """Vocabulary-parallel token NLL over the world of processes."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 4, generator=generator), torch.randn(8, 4, generator=generator)
    target = torch.tensor([0, 7, 3, 4, 5])
    local = weight.chunk(2)[dist.get_rank()]
    split = token_nll(hidden, local, target, groups=ParallelGroups(tensor=dist.group.WORLD))
    return float((split - token_nll(hidden, weight, target)).abs().max())


def raises(rank):
    if rank == 1:
        raise ValueError("the third layer is missing")
    dist.barrier()


def dies(rank):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def hangs(rank):
    if rank == 1:
        threading.Event().wait()
    return rank


def test_processes_return_in_rank_order():
    results = run_distributed(good, 2, 0.5)
    assert [result[:3] for result in results] == [(0, 2, 1.5), (1, 2, 1.5)]
    assert max(result[3] for result in results) < 1e-6


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (raises, RuntimeError, r"(?s)rank 1 of 2 failed:.*in raises.*ValueError: the third layer is missing"),
        (dies, RuntimeError, r"rank 1 of 2 failed:\nit died with exit code 7"),
    ],
)
def test_a_failing_process_is_reported_and_all_are_stopped(fn, error, message):
    with pytest.raises(error, match=message):
        run_distributed(fn, 2, timeout_s=400)
    assert not multiprocessing.active_children()


def test_a_hanging_process_is_killed():
    with pytest.raises(TimeoutError, match=r"ranks \[(0, )?1\] of 2 did not finish in time"):
        run_distributed(hangs, 2, timeout_s=1)
    assert not multiprocessing.active_children()


def thread_raises(group):
    if group.rank() == 1:
        raise ValueError("no such token")
    return group.rank()


def thread_hangs(group, event):
    if group.rank() == 1:
        event.wait()
    return group.rank()


def test_threads_report_too():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed:.*ValueError: no such token"):
        run_threads(thread_raises, 2)
    event = threading.Event()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not finish within 0.2 s"):
        run_threads(thread_hangs, 2, event, timeout_s=0.2)
    event.set()
