"""Writing a checkpoint: at once, or from a copy in host memory by a thread while training goes on.

A checkpoint is written under a temporary name, gets its ``complete`` marker last and is then renamed, so a directory
of the final name is whole and a crash leaves only what the next save removes.

Planning, the bytes and their metadata are Megatron's in both cases. Its own ``AsyncCallsQueue`` is not used: it forks
the training process, whose threads and open sockets the child inherits, and is deprecated from 0.19 on.
"""

import contextlib
import inspect
import logging
import os
import queue
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from asympo_megatron.errors import CheckpointError
from asympo_megatron.files import fsync
from asympo_megatron.mcore.checkpoint import last_line, on_rank0, sharded_state
from asympo_megatron.mcore.checkpoint_files import gathered, own_digests, with_the_rest
from asympo_megatron.mcore.marker import make_marker, write_marker

if TYPE_CHECKING:
    from asympo_megatron.mcore.learner import Learner

log = logging.getLogger(__name__)

TEMPORARY = ".tmp"


def save(learner: "Learner", directory: Path) -> None:
    """Collective: write the learner's whole state to ``directory``.

    Raises:
        CheckpointError: see :class:`Saving`.
    """
    Saving(learner, directory, background=False).complete()


class Saving:
    """A checkpoint on its way to the disk. Every rank makes every call (all are collective).

    Args:
        learner: whose state is saved as it is now.
        directory: name of the checkpoint when it is complete.
        background: copy the state and write it in a thread, so that the learner may train on; else :meth:`complete`
            writes it, and the learner must not change before.

    Raises:
        CheckpointError: ``directory`` does not exist then. On every rank, or (a failure outside the writer of shards)
            on one while others still wait for it: the process must end, and the launcher ends theirs.
    """

    def __init__(self, learner: "Learner", directory: Path, *, background: bool) -> None:
        self._learner, self._directory = learner, directory
        needed_bytes = _size(learner)
        # A name of its own: a trainer that was stopped while writing may wake beside its replacement.
        name = on_rank0(learner, lambda: _prepare(directory, needed_bytes))
        self._temporary = directory.with_name(name)
        self._marker = make_marker(
            learner.config,
            learner.plan.facts,
            step=learner.step_count,
            ranks=learner.layout.world_size,
            dtype=learner.config.model.dtype,
            checksum=learner.checksum(),
        )
        self._writer: threading.Thread | None = None
        self._digests: dict[str, str] = {}
        with self._failing_together(), in_process_results():
            self._request: Any = _plan(learner, self._temporary)
        if background and self._request.async_fn is not None:  # a rank may have nothing to write
            buckets = snapshot(self._request)
            self._writer = threading.Thread(target=self._write, args=(buckets,), name="checkpoint")
            self._writer.start()
        self._background = background

    def written(self, *, wait: bool) -> bool:
        """Whether the threads of all ranks are done, or wait for them: :meth:`complete` has no shard left to write."""
        if self._writer is not None and wait:
            self._writer.join()
        busy = self._writer is not None and self._writer.is_alive()
        box = torch.tensor([int(busy)], device=self._learner.layout.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return not box.item()

    def complete(self) -> None:
        """Give the checkpoint its name as soon as everything is written."""
        with self._failing_together():
            if self._background:
                if self._writer is not None:
                    self._writer.join()
                for finalize in self._request.finalize_fns:
                    finalize()
            else:
                self._request.execute_sync()
                self._digest()
        files = gathered(self._digests)
        on_rank0(self._learner, lambda: _finish(self._temporary, self._directory, self._marker, files))

    def _write(self, buckets: list[Any]) -> None:
        write_buckets(self._request, buckets)
        self._digest()

    def _digest(self) -> None:
        self._digests = own_digests(self._temporary, self._learner.layout.rank)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Raise on every rank what any of them ran into, and leave nothing behind."""
        problem = ""
        try:
            yield
        except CheckpointException as error:  # of torch, no Exception; the writers agree before they raise it
            problem = last_line(error)
        except Exception as error:
            problem = last_line(error)
            if self._learner.layout.world_size > 1:
                # The others are in some collective of dist_checkpointing: to join them in another one would hang the
                # job.
                log.exception("rank %d failed alone while saving", self._learner.layout.rank)
                raise self._unwritten(problem) from error
        problems: list[str] = [""] * self._learner.layout.world_size
        dist.all_gather_object(problems, problem)
        failed = next((text for text in problems if text), "")
        if failed:
            on_rank0(self._learner, lambda: shutil.rmtree(self._temporary, ignore_errors=True))
            raise self._unwritten(failed)

    def _unwritten(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self._directory} could not be written: {problem}. Free some space, or change run.root."
        )


def remove_leftovers(root: Path) -> None:
    """Remove what interrupted saves (and removals) left behind."""
    for leftover in root.glob(f"step_*{TEMPORARY}"):
        shutil.rmtree(leftover, ignore_errors=True)


def _plan(learner: "Learner", temporary: Path) -> Any:
    """Megatron's request to write the state: tensors on this rank, and what to do when all ranks have written."""
    # From 0.19 on another package would write; the name of Megatron's own way is what older versions lack.
    known = inspect.signature(dist_checkpointing.save).parameters
    strategy: dict[str, Any] = {"async_strategy": "mcore"} if "async_strategy" in known else {}
    state = sharded_state(learner, loading=False)
    return dist_checkpointing.save(state, str(temporary), async_sharded_save=True, **strategy)


def snapshot(request: Any) -> list[Any]:
    """The tensors of a request in memory of their own on the host, bucket by bucket; the request lets go of its own.

    It lives until all is written, and what was gathered for it would be held twice. Its buckets are still counted.
    """
    copies = []
    # ``preload_fn`` brings tensors from the GPU; on a CPU it returns the live ones.
    for staged, live in zip(request.preload_fn(), request.async_fn_args[1], strict=True):
        path, key, (objects, tensors) = staged
        _, _, (_, originals) = live
        own = [
            (item, tensor.clone() if tensor is original else tensor)
            for (item, tensor), (_, original) in zip(tensors, originals, strict=True)
        ]
        copies.append((path, key, (objects, own)))
        originals.clear()
    return copies


def write_buckets(request: Any, buckets: list[Any]) -> None:
    """What ``request.async_fn`` does, in this thread: 0.16 forks a process a bucket, with this process's threads."""
    transforms, _ = request.async_fn.args
    results: dict[int, Any] = {}
    problem: Exception | None = None
    try:
        for number, bucket in enumerate(buckets):
            outcomes: queue.Queue[tuple[int, Any]] = queue.Queue()
            running: queue.Queue[int] = queue.Queue()
            running.put(number)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, number, bucket, outcomes, running, use_fsync=True
            )
            _, results[number] = outcomes.get_nowait()
            if isinstance(results[number], Exception):
                raise results[number]
    except Exception as error:  # of whatever kind: the ranks hear of it when they complete the checkpoint
        problem = error
    request.async_fn_args[2].put(problem or results)


@contextlib.contextmanager
def in_process_results() -> Iterator[None]:
    """Let the writer hand its results over in this process.

    ``filesystem_async`` starts a manager process by spawn for its results: it imports the program once more (endlessly
    without a ``__main__`` guard) and outlives the save. Ours are written by this process or its children.
    """
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def _size(learner: "Learner") -> int:
    """Collective: bytes of weights, float32 masters and two moments of one replica, about what will be written."""
    size = 0
    if learner.layout.dp_rank == 0 and learner.layout.groups.context_rank == 0:
        masters = 0 if learner.config.model.dtype == "fp32" else 4
        params = (param for chunk in learner.chunks for param in chunk.parameters())
        size = sum(param.numel() * (param.element_size() + masters + 8) for param in params)
    box = torch.tensor([size], device=learner.layout.device)
    dist.all_reduce(box)
    return int(box.item())


def _prepare(directory: Path, needed_bytes: int) -> str:
    """Make the temporary directory, and refuse what cannot succeed before ranks depend on each other; its name."""
    if directory.exists():
        raise CheckpointError(f"{directory} exists already; a checkpoint is never overwritten.")
    temporary = directory.with_name(f"{directory.name}.{secrets.token_hex(4)}{TEMPORARY}")
    temporary.mkdir(parents=True)
    free_bytes = shutil.disk_usage(temporary).free
    if free_bytes < needed_bytes:
        temporary.rmdir()
        raise CheckpointError(
            f"{directory} needs about {needed_bytes / 2**20:.1f} MiB and {free_bytes / 2**20:.1f} MiB are free. "
            "Free some space, lower checkpoint.keep_last, or change run.root."
        )
    return temporary.name


def _finish(temporary: Path, directory: Path, marker: dict[str, Any], digests: dict[str, str]) -> None:
    for file in temporary.iterdir():  # shards are on the disk already, what describes them may not be
        fsync(file)
    write_marker(temporary, {**marker, "files": with_the_rest(temporary, digests)})
    os.rename(temporary, directory)
    fsync(directory.parent)  # the rename itself must survive a power cut
