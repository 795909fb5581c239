"""Run a function on several gloo ranks and get every rank's result, for tests.

:func:`run_distributed` starts real processes; :func:`run_threads` runs the ranks as threads of this process, with real
gloo collectives, in milliseconds and under coverage. Use threads for code that takes its groups as arguments, processes
for anything that has global state.
"""

import multiprocessing
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


def run_distributed(fn: Callable[..., Result], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Result]:
    """Call ``fn(rank, *args)`` in ``world_size`` fresh processes that share a gloo world.

    Start-up takes seconds: run many cases in one call. Every process is gone when this returns or raises.

    Args:
        fn: a function at module level (spawned processes import it by name).
        world_size: number of ranks; the default process group spans them all.
        args: picklable arguments.
        timeout_s: for everything together; also the time-out of each collective.

    Returns:
        The ranks' results, in rank order.

    Raises:
        RuntimeError: a rank raised or died; the message holds its traceback or exit code.
        TimeoutError: not all ranks finished in time; the message names those that did not.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes: list[BaseProcess] = []
        pipes: dict[Connection, int] = {}
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                init = f"file://{Path(folder, 'rendezvous')}"
                process: BaseProcess = context.Process(
                    target=_process_main, args=(fn, rank, world_size, init, timeout_s, sender, args), daemon=True
                )
                process.start()
                sender.close()  # so that the death of the child closes the pipe
                processes.append(process)
                pipes[receiver] = rank
            results = _collect(pipes, processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def run_threads(fn: Callable[..., Result], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Result]:
    """Call ``fn(group, *args)`` in ``world_size`` threads; ``group`` is a gloo group of them.

    There is no default process group: ``fn`` must pass ``group`` to every collective.

    Returns:
        The ranks' results, in rank order.

    Raises:
        RuntimeError: a rank raised; the message holds its traceback.
        TimeoutError: a rank did not finish; its collective gives up after ``timeout_s``.
    """
    store = dist.HashStore()
    results: dict[int, Result] = {}
    errors: dict[int, str] = {}

    def rank_main(rank: int) -> None:
        try:
            group = dist.ProcessGroupGloo(store, rank, world_size, timedelta(seconds=timeout_s))
            results[rank] = fn(group, *args)
        except BaseException:
            errors[rank] = traceback.format_exc()

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        while thread.is_alive() and not errors and time.monotonic() < deadline:
            thread.join(0.02)
    for rank, text in sorted(errors.items()):
        raise RuntimeError(f"rank {rank} of {world_size} failed:\n{text}")
    missing = [rank for rank in range(world_size) if rank not in results]
    if missing:
        raise TimeoutError(f"ranks {missing} of {world_size} did not finish within {timeout_s:g} s.")
    return [results[rank] for rank in range(world_size)]


def _collect(pipes: dict[Connection, int], processes: list[BaseProcess], deadline: float) -> dict[int, Any]:
    results: dict[int, Any] = {}
    pending = dict(pipes)
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} of {len(processes)} did not finish in time.")
        # One rank's failure makes its peers fail, too: tell all that is known, the cause is among it.
        failures = []
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending.pop(pipe)
            succeeded, value = _receive(pipe, processes[rank])
            if succeeded:
                results[rank] = value
            else:
                failures.append(f"rank {rank} of {len(processes)} failed:\n{value}")
        if failures:
            raise RuntimeError("\n".join(failures))
    return results


def _receive(pipe: Connection, process: BaseProcess) -> tuple[bool, Any]:
    try:
        succeeded, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(1.0)
        return False, f"it died with exit code {process.exitcode}."
    return succeeded, value


def _process_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    init_method: str,
    timeout_s: float,
    sender: Connection,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
        reply = (True, fn(rank, *args))
    except BaseException:
        reply = (False, traceback.format_exc())
    # Bytes, not torch's shared-memory handles: those die with the process that sends them.
    sender.send_bytes(pickle.dumps(reply))
    sender.close()
    sys.stdout.flush()
