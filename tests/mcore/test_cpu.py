"""The CPU backend: CUDA literals mean the CPU while it is installed, and only then."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from rank_programs import PROGRAM

from asympo_megatron.mcore import cpu
from asympo_megatron.testing.distributed import run_threads
from asympo_megatron.testing.megatron import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is inactive where CUDA is")


@pytest.fixture
def installed(one_rank: None) -> None:
    cpu.install()
    cpu.install()  # idempotent: one translation, undone by one leave()


def test_literal_devices(installed: None) -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=torch.device("cuda", 0)).device.type == "cpu"
    x = torch.zeros(2)
    assert x.cuda() is x
    assert x.to("cuda").device.type == "cpu"
    assert torch.tensor([1], pin_memory=True).tolist() == [1]
    assert x.type() == "torch.cuda.FloatTensor"
    assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    cpu.leave()
    assert x.type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def _unequal(group: Any) -> tuple[list[Any], Any]:
    """Rank 0 holds one row, rank 1 two."""
    rank = group.rank()
    own = torch.arange(3.0 * (rank + 1)).view(-1, 3) + 10 * rank
    gathered = [torch.empty(1, 3), torch.empty(2, 3)]
    torch.distributed.all_gather(gathered, own, group=group)
    share = torch.empty(rank + 1, 3)
    parts = [torch.full((1, 3), rank + 1.0), torch.full((2, 3), 10.0 * (rank + 1))]
    torch.distributed.reduce_scatter(share, parts, group=group)
    return [tensor.tolist() for tensor in gathered], share.tolist()


def test_gathers_of_unlike_sizes(installed: None) -> None:
    """What ranks that share the matrices of an expert exchange."""
    rows = [[[0.0, 1.0, 2.0]], [[10.0, 11.0, 12.0], [13.0, 14.0, 15.0]]]
    assert run_threads(_unequal, 2) == [(rows, [[3.0] * 3]), (rows, [[30.0] * 3] * 2)]


def test_random_state_is_the_cpu_generators(installed: None) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("first", 1)
    tracker.add("second", 2)
    draws = []
    for name in ("first", "second", "first"):
        with tracker.fork(name):
            draws.append(torch.rand(1).item())
    torch.manual_seed(1)
    assert [draws[0], draws[2]] == torch.rand(1).tolist() + torch.rand(1).tolist()
    assert draws[1] != draws[0]


def test_absent_kernels_say_so() -> None:
    with pytest.raises(RuntimeError, match="paged kernels are not available without a GPU"):
        cpu._Absent("paged kernels").anything(1)


@pytest.mark.slow
def test_the_compiler_can_still_be_imported() -> None:
    """torch._dynamo keeps a table of torch's functions and refuses doubles among the replaced ones."""
    code = "from asympo_megatron.mcore import cpu; cpu.install(); import torch._dynamo"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=240)


@pytest.mark.slow
def test_scatter_of_views() -> None:
    got = run_ranks(f"{PROGRAM}:scatter_views", 2, timeout_s=240)
    assert got == [[[0.0, 2.0], [4.0, 6.0]], [[1.0, 3.0], [5.0, 7.0]]]
