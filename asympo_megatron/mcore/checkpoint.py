"""Checkpoints of the whole training state through Megatron's dist_checkpointing: any layout saves, any layout loads.

What they hold, and how they are read; ``checkpoint_save`` writes them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from asympo_megatron.errors import CheckpointError, DamagedCheckpointError
from asympo_megatron.mcore import distopt
from asympo_megatron.mcore.checkpoint_files import check_files
from asympo_megatron.mcore.marker import check_model, check_run, layout_of, read_marker
from asympo_megatron.mcore.model import policy_models

if TYPE_CHECKING:
    from asympo_megatron.mcore.learner import Learner

Result = TypeVar("Result")


def load(learner: "Learner", directory: Path, *, weights_only: bool) -> None:
    """Collective: read a checkpoint of any layout into the learner.

    Raises:
        DamagedCheckpointError: unreadable, or with other weights than were saved.
        CheckpointError: missing, incomplete, or of another model or run.
    """
    # One rank reads for all: on a shared file system the others may not see the same, or nothing yet.
    marker = on_rank0(learner, lambda: read_marker(directory))
    check_model(marker, learner.plan.facts, directory)
    if not weights_only:  # weights have a checksum of their own
        check_run(marker, learner.config, directory)
        check_files(directory, marker.get("files", {}))
    same_layout = marker["layout"] == layout_of(learner.config, learner.layout.world_size)
    state = sharded_state(learner, loading=True, weights_only=weights_only, same_layout=same_layout)
    try:
        loaded = dist_checkpointing.load(state, str(directory))
    except (Exception, CheckpointException) as error:
        raise DamagedCheckpointError(f"{directory} could not be read: {last_line(error)}.") from error
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


def sharded_state(
    learner: "Learner", *, loading: bool, weights_only: bool = False, same_layout: bool = True
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathered over gloo to the one rank that writes; else on every rank, through the memory of its GPU.
        "distrib_optim_fully_reshardable_mem_efficient": True,
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
        raise DamagedCheckpointError(
            f"checkpoint {directory} was saved with weights of checksum {marker['checksum']} and loaded with {got}: "
            "its files are damaged. Use an older one."
        )


def last_line(error: BaseException) -> str:
    """What happened, without the traceback that CheckpointException carries in its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def on_rank0(learner: "Learner", action: Callable[[], Result]) -> Result:
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
