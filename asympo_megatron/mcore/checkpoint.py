"""Checkpoints of the whole training state through Megatron's dist_checkpointing: any layout saves, any layout loads.

A checkpoint is written under a temporary name, gets its ``complete`` marker last and is then renamed, so a directory
of the final name is whole and a crash leaves only what the next save removes.
"""

import contextlib
import logging
import os
import queue
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore import distopt
from asympo_megatron.mcore.marker import check_model, check_run, layout_of, make_marker, read_marker, write_marker
from asympo_megatron.mcore.model import policy_models

if TYPE_CHECKING:
    from asympo_megatron.mcore.learner import Learner

Result = TypeVar("Result")

log = logging.getLogger(__name__)

TEMPORARY = ".tmp"


def save(learner: "Learner", directory: Path) -> None:
    """Collective: write the learner's whole state to ``directory``.

    Raises:
        CheckpointError: ``directory`` does not exist then. On every rank, or (a failure outside the writer of shards)
            on one while others still wait for it: the process must end, and the launcher ends theirs.
    """
    temporary = directory.with_name(directory.name + TEMPORARY)
    needed_bytes = _size(learner)
    _on_rank0(learner, lambda: _prepare(directory, temporary, needed_bytes))
    problem = _write(learner, temporary)
    problems: list[str] = [""] * learner.layout.world_size
    dist.all_gather_object(problems, problem)
    failed = next((text for text in problems if text), "")
    if failed:
        _on_rank0(learner, lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise _unwritten(temporary, failed)
    marker = make_marker(
        learner.config,
        learner.plan.facts,
        step=learner.step_count,
        ranks=learner.layout.world_size,
        dtype=learner.config.model.dtype,
        checksum=learner.checksum(),
    )
    _on_rank0(learner, lambda: _finish(temporary, directory, marker))


def _write(learner: "Learner", temporary: Path) -> str:
    """What went wrong and every rank knows of, or nothing."""
    try:
        with in_process_results():
            dist_checkpointing.save(_state(learner, loading=False), str(temporary))
    except CheckpointException as error:  # of torch, no Exception; the writers agree before they raise it
        return _last_line(error)
    except Exception as error:
        if learner.layout.world_size == 1:
            return _last_line(error)
        # The others are in some collective of dist_checkpointing: joining them in another one would hang the job.
        log.exception("rank %d failed alone while saving", learner.layout.rank)
        raise _unwritten(temporary, _last_line(error)) from error
    return ""


def _unwritten(temporary: Path, problem: str) -> CheckpointError:
    directory = temporary.with_name(temporary.name.removesuffix(TEMPORARY))
    return CheckpointError(f"{directory} could not be written: {problem}. Free some space, or change run.root.")


def load(learner: "Learner", directory: Path, *, weights_only: bool) -> None:
    """Collective: read a checkpoint of any layout into the learner.

    Raises:
        CheckpointError: missing, incomplete, of another model, unreadable, or with other weights than were saved.
    """
    # One rank reads for all: on a shared file system the others may not see the same, or nothing yet.
    marker = _on_rank0(learner, lambda: read_marker(directory))
    check_model(marker, learner.plan.facts, directory)
    if not weights_only:
        check_run(marker, learner.config, directory)
    same_layout = marker["layout"] == layout_of(learner.config, learner.layout.world_size)
    state = _state(learner, loading=True, weights_only=weights_only, same_layout=same_layout)
    try:
        loaded = dist_checkpointing.load(state, str(directory))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{directory} could not be read: {_last_line(error)}") from error
    models = list(policy_models(learner.chunks))
    for key, model in zip(_model_keys(models), models, strict=True):
        _load_weights(model, loaded[key])
    if weights_only:
        learner.weights_changed()
        _check_weights(marker, learner, directory)
        return
    distopt.load_state(learner.optimizer, loaded["optimizer"])
    _check_weights(marker, learner, directory)
    if "rng" in loaded:
        _restore_rng(loaded["rng"])
    learner.step_count = int(marker["step"])


def _state(
    learner: "Learner", *, loading: bool, weights_only: bool = False, same_layout: bool = True
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    models = list(policy_models(learner.chunks))
    for chunk in learner.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    state: dict[str, Any] = {
        key: model.sharded_state_dict(metadata=metadata) for key, model in zip(_model_keys(models), models, strict=True)
    }
    if weights_only:
        return {key: _without_objects(entries) for key, entries in state.items()}
    distopt.prepare(learner.optimizer)
    with distopt.compact_offsets(learner.optimizer):
        state["optimizer"] = learner.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    distopt.unshare_steps(learner.optimizer)
    if same_layout:
        layout = learner.layout
        state["rng"] = ShardedObject("rng", _rng(), (layout.world_size,), (layout.rank,))
    return state


def _without_objects(entries: dict[str, Any]) -> dict[str, Any]:
    """Weights alone. Modules add ``_extra_state`` for fp8, which differs between layer specs and is empty here."""
    return {name: entry for name, entry in entries.items() if not isinstance(entry, ShardedObject)}


def _load_weights(model: Any, weights: dict[str, Any]) -> None:
    result = model.load_state_dict(weights, strict=False)
    strangers = [name for name in (*result.missing_keys, *result.unexpected_keys) if not name.endswith("_extra_state")]
    assert not strangers, strangers  # dist_checkpointing would have refused them


def _model_keys(models: list[Any]) -> list[str]:
    return ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]


def _rng() -> dict[str, Any]:
    states = {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _check_weights(marker: dict[str, Any], learner: "Learner", directory: Path) -> None:
    """Collective: what was loaded, through whatever resharding, is what was saved; rounding to another dtype is not."""
    if marker.get("dtype") != learner.config.model.dtype:
        return
    got = learner.checksum()
    if got != marker["checksum"]:
        raise CheckpointError(
            f"checkpoint {directory} was saved with weights of checksum {marker['checksum']} and loaded with {got}: "
            "its files are damaged. Use an older one."
        )


def _last_line(error: BaseException) -> str:
    """What happened, without the traceback that CheckpointException carries in its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


@contextlib.contextmanager
def in_process_results() -> Iterator[None]:
    """Let the writer hand its results over in this process.

    ``filesystem_async._get_write_results_queue`` starts a manager process by spawn for asynchronous saves: it imports
    the program once more (endlessly without a ``__main__`` guard) and outlives the save. Ours is synchronous.
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


def _prepare(directory: Path, temporary: Path, needed_bytes: int) -> None:
    """Refuse what cannot succeed before ranks depend on each other inside dist_checkpointing."""
    if directory.exists():
        raise CheckpointError(f"{directory} exists already; a checkpoint is never overwritten.")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    free_bytes = shutil.disk_usage(temporary).free
    if free_bytes < needed_bytes:
        temporary.rmdir()
        raise CheckpointError(
            f"{directory} needs about {needed_bytes / 2**20:.1f} MiB and {free_bytes / 2**20:.1f} MiB are free. "
            "Free some space, lower checkpoint.keep_last, or change run.root."
        )


def _finish(temporary: Path, directory: Path, marker: dict[str, Any]) -> None:
    write_marker(temporary, marker)
    os.rename(temporary, directory)
    parent = os.open(directory.parent, os.O_RDONLY)
    try:
        os.fsync(parent)  # the rename itself must survive a power cut
    finally:
        os.close(parent)


def _on_rank0(learner: "Learner", action: Callable[[], Result]) -> Result:
    """Run file operations on one rank and tell all what they returned; if they fail, every rank raises."""
    box: list[Any] = ["", None]
    if learner.layout.rank == 0:
        try:
            box[1] = action()
        except OSError as error:  # CheckpointError is one, too
            box[0] = str(error) or type(error).__name__
    dist.broadcast_object_list(box, src=0, device=learner.layout.device)
    problem, result = box
    if problem:
        raise CheckpointError(problem)
    return cast(Result, result)
