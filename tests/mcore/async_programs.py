"""Programs of test ranks that train on while a checkpoint is written; not tests themselves."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rank_programs import build, make_rows, microbatches

from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore import Checkpoints, checkpoint_save, shutdown
from asympo_megatron.testing.megatron import join_group

# isort: split
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

PROGRAM = __file__


@contextmanager
def held_writer() -> Iterator[threading.Event]:
    """Writers begun inside start when the event is set."""
    go, write = threading.Event(), checkpoint_save.write_buckets

    def held(request: Any, buckets: list[Any]) -> None:
        go.wait()
        write(request, buckets)

    checkpoint_save.write_buckets = held
    try:
        yield go
    finally:
        go.set()
        checkpoint_save.write_buckets = write


def live_tensors(request: Any) -> list[Any]:
    """Mutant of ``checkpoint_save.snapshot``: nothing is copied."""
    return request.async_fn_args[1]


def _steps(case: dict[str, Any], learner: Any, config: Any, layout: Any, count: int) -> list[dict[str, float]]:
    figures = []
    for _ in range(count):
        rows = make_rows(learner.step_count)
        figures.append(learner.step(microbatches(rows, config, layout), len(rows)))
    return figures


def trained_on(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Two steps, the state saved twice: at once, and while two more steps are trained; then resumed from both."""
    if "RANK" in os.environ:
        join_group(name)
    try:
        config, layout, learner = build(case)
        _steps(case, learner, config, layout, 2)
        learner.save(Path(case["at_once"]))
        with held_writer() as go:
            saving = checkpoint_save.Saving(learner, Path(case["meanwhile"]), background=True)
            before = [saving.written(wait=False)]
            result: dict[str, Any] = {"figures": _steps(case, learner, config, layout, 2)}
            before.append(saving.written(wait=False) or Path(case["meanwhile"]).exists())
            go.set()
        saving.complete()
        result |= {"written before": before, "checksum": learner.checksum(), "resumed": []}
        for path in (case["at_once"], case["meanwhile"]):
            learner.load(Path(path))
            figures = _steps(case, learner, config, layout, 2)
            result["resumed"].append([figures, learner.checksum()])
        return result
    finally:
        shutdown()


def trained_cases(payload: dict[str, Any]) -> dict[str, Any]:
    """Several layouts in one process: case name -> result."""
    return {name: trained_on(name, case) for name, case in payload["cases"].items()}


def _second_save(root: str) -> tuple[Checkpoints, Any]:
    """A checkpoint of step 1, and a learner at step 2."""
    join_group(root)
    config, layout, learner = build({})
    checkpoints = Checkpoints(root, 2)
    _steps({}, learner, config, layout, 1)
    checkpoints.save(learner)
    _steps({}, learner, config, layout, 1)
    return checkpoints, learner


def killed(payload: dict[str, Any]) -> None:
    """The last rank dies in the middle of writing."""
    write = FileSystemWriterAsync.write_preloaded_data

    def write_and_die(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints, learner = _second_save(payload["root"])
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        FileSystemWriterAsync.write_preloaded_data = staticmethod(write_and_die)
    checkpoints.begin(learner, background=True)
    checkpoints.ready(wait=True)
    checkpoints.complete()


def full_disk(payload: dict[str, Any]) -> dict[str, Any]:
    """One rank's disk is full while it writes; then there is room again."""
    checkpoints, learner = _second_save(payload["root"])
    write = FileSystemWriterAsync.write_preloaded_data

    def no_space(transforms: Any, number: int, bucket: Any, outcomes: Any, running: Any, **_: Any) -> None:
        outcomes.put((number, OSError(errno.ENOSPC, "No space left on device")))

    result: dict[str, Any] = {}
    for rank in (0, 1):
        if learner.layout.rank == rank:
            FileSystemWriterAsync.write_preloaded_data = staticmethod(no_space)
        checkpoints.begin(learner, background=True)
        FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
        try:
            checkpoints.complete()
        except CheckpointError as error:
            result[f"rank {rank}"] = str(error)
        newest = checkpoints.newest()
        result[f"newest after {rank}"] = newest.name if newest else ""
    checkpoints.begin(learner, background=True)
    checkpoints.complete()
    result["files"] = sorted(path.name for path in checkpoints.root.iterdir())
    return result
