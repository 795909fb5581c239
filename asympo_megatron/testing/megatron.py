"""Several real ranks on one machine: gloo processes with a time-out, JSON in, JSON out.

Process start-up dominates on a small machine, so start once per world size and run many cases inside.
"""

import faulthandler
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

_MANY_THREADS = 32
"""More than a process has without groups."""


class RankError(AssertionError):
    """A rank failed, or did not end in time; the message holds the end of its output."""


def run_ranks(
    program: str, world_size: int, payload: Mapping[str, Any] | None = None, *, timeout_s: float = 300.0
) -> list[Any]:
    """Run ``program`` on ``world_size`` ranks under torchrun's environment variables and collect what each returns.

    Args:
        program: ``path/to/file.py:function``; the function takes the payload and returns JSON-able data.
        payload: passed to every rank as JSON.
        timeout_s: for all ranks together; survivors are killed.

    Returns:
        One result per rank, in rank order.

    Raises:
        RankError: a rank failed or the time is up. All ranks have ended.
    """
    # The store lives here, so that its port is chosen by the kernel and no rank races for it.
    store = TCPStore("127.0.0.1", 0, world_size=None, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "payload.json").write_text(json.dumps(dict(payload or {})))
        ranks = [_start(program, rank, world_size, store.port, Path(folder)) for rank in range(world_size)]
        try:
            _wait(ranks, Path(folder), time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in ranks:
                with suppress(ProcessLookupError):
                    process.kill()
                process.wait()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]


def leave_groups() -> None:
    """Shut Megatron-Core down and free its learners, whose process groups have threads that wake 100 times a second."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from asympo_megatron.mcore import shutdown

    shutdown()
    gc.collect()
    if psutil.Process().num_threads() > _MANY_THREADS:
        # The float32 weights of a distributed optimizer are views of the model's. Their autograd nodes, which gc cannot
        # look into, hold the hooks of DDP, and these hold all the rest.
        for optimizer in [found for found in gc.get_objects() if isinstance(found, DistributedOptimizer)]:
            vars(optimizer).clear()
        gc.collect()


def join_group(name: str) -> None:
    """Join torch.distributed with all ranks that say the same ``name``; call it before ``mcore.initialize``.

    The store outlives the cases of a program, so each case needs names of its own in it: gloo would otherwise meet
    the addresses of a group that has left.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size=None, is_master=False)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore(name, store), rank=rank, world_size=world_size)


def _start(program: str, rank: int, world_size: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "asympo_megatron.testing.megatron", program, str(folder)]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, deadline: float, timeout_s: float) -> None:
    running = dict(enumerate(ranks))
    while running:
        for rank, process in list(running.items()):
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.05)
                del running[rank]
                if code != 0:
                    raise RankError(f"rank {rank} ended with code {code}:\n{_tail(folder, rank)}")
        if running and time.monotonic() > deadline:
            _dump_stacks(running)
            tails = "\n".join(f"rank {rank}:\n{_tail(folder, rank)}" for rank in running)
            raise RankError(f"time-out after {timeout_s} s; still running: {sorted(running)}\n{tails}")


def _dump_stacks(running: Mapping[int, subprocess.Popen[bytes]]) -> None:
    """Have every hanging rank write where it hangs into its log."""
    for process in running.values():
        process.send_signal(signal.SIGABRT)  # faulthandler prints all threads, then the process ends
    for process in running.values():
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10.0)


def _tail(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.log").read_text(errors="replace")[-3000:]


def _load(program: str) -> Callable[[Any], Any]:
    file, _, name = program.rpartition(":")
    sys.path.insert(0, str(Path(file).parent))  # as for a script: a program may have helpers beside it
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[[Any], Any] = getattr(module, name)
    return function


def main(program: str, folder: str) -> None:
    """Entry point of one rank."""
    faulthandler.enable()
    torch.set_num_threads(1)
    payload = json.loads((Path(folder) / "payload.json").read_text())
    result = _load(program)(payload)
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
