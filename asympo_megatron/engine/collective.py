"""Weights that a trainer broadcasts: joining its group, receiving buckets in a session, as the real server does."""

import asyncio
import threading

import msgspec
import torch
from aiohttp import web
from torch import Tensor

from asympo_megatron.engine.model import check_names
from asympo_megatron.engine.state import ENGINE, Engine, json_response, read_json
from asympo_megatron.errors import EngineError, PublishError
from asympo_megatron.protocol import BucketInfo
from asympo_megatron.sync.bucket import bucket_bytes, split_bucket
from asympo_megatron.sync.group import BACKENDS, WeightGroup, join_group, reach_store

_DEFAULT_NAME = "weight_update_group"
_LOAD_FORMATS = (None, "flattened_bucket")


class InitGroupBody(msgspec.Struct, frozen=True):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = _DEFAULT_NAME
    backend: str = "nccl"


class DestroyGroupBody(msgspec.Struct, frozen=True):
    group_name: str = _DEFAULT_NAME


class DistributedUpdateBody(msgspec.Struct, frozen=True):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = _DEFAULT_NAME
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    load_format: str | None = None


async def init_group(request: web.Request) -> web.Response:
    """Join a trainer's group as its only receiver; answers when everybody has come."""
    engine = request.app[ENGINE]
    body = await read_json(request, InitGroupBody)
    if body.backend not in BACKENDS or body.group_name in engine.groups:
        wrong = f"group {body.group_name} is there already" if body.backend in BACKENDS else f"backend {body.backend!r}"
        return _answer(False, f"Failed to initialize custom process group: {wrong}.")
    try:
        engine.groups[body.group_name] = await asyncio.to_thread(_join, body, engine.options.group_timeout_s)
    except RuntimeError as error:
        return _answer(False, f"Failed to initialize custom process group: {error}.")
    return _answer(True, "Succeeded to initialize custom process group.")


async def destroy_group(request: web.Request) -> web.Response:
    """Leave a group."""
    body = await read_json(request, DestroyGroupBody)
    groups = request.app[ENGINE].groups
    if body.group_name not in groups:
        return _answer(False, "The group to be destroyed does not exist.")
    left = [groups.pop(body.group_name)]
    threading.Thread(target=left.clear, daemon=True).start()  # gloo takes its time to end a group; nobody waits for it
    return _answer(True, "Succeeded to destroy custom process group.")


async def update_from_distributed(request: web.Request) -> web.Response:
    """Receive one broadcast and replace the weights it names; refused at once outside a session."""
    engine = request.app[ENGINE]
    body = await read_json(request, DistributedUpdateBody)
    if not engine.in_session:
        return _answer(
            False, "update_weights_from_distributed must run between begin_weight_update() and end_weight_update()"
        )
    if body.abort_all_requests:
        await engine.thread.call(engine.scheduler.abort, "", True)
    try:
        async with engine.update_lock:
            # Taken, not lent: after a failure somebody may still write to it.
            memory, engine.received = engine.received, engine.received.new_empty(0)
            memory, weights = await _receive(engine, body, memory)
            path = engine.scheduler.model_path
            await engine.thread.update(weights, path, body.weight_version, body.flush_cache)
            engine.received = memory
    except (EngineError, PublishError) as error:
        return _answer(False, f"Failed to update parameter online: {error}")
    message = "Succeeded to update parameter online."
    if body.weight_version is not None:
        message += f" Weight version updated to {body.weight_version}."
    return _answer(True, message)


def _join(body: InitGroupBody, timeout_s: float) -> WeightGroup:
    store = reach_store(body.master_address, body.master_port, timeout_s)
    return join_group(store, body.group_name, body.rank_offset, body.world_size, body.backend, timeout_s)


async def _receive(engine: Engine, body: DistributedUpdateBody, memory: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The tensors of a bucket, as views of the memory, which is replaced where it is too small."""
    group = engine.groups.get(body.group_name)
    if group is None:
        known = list(engine.groups)
        raise EngineError(f"Group {body.group_name} not in {known}. Please call `init_weights_update_group` first.")
    if body.load_format not in _LOAD_FORMATS:
        raise EngineError(f"load_format is {body.load_format!r}; expected flattened_bucket, or none.")
    if not len(body.names) == len(body.dtypes) == len(body.shapes) > 0:
        raise EngineError("names, dtypes and shapes must have one entry for each tensor.")
    info = BucketInfo(body.names, body.dtypes, body.shapes)
    size = bucket_bytes(info)
    if memory.numel() < size or memory.device != group.device:
        memory = torch.empty(size, dtype=torch.uint8, device=group.device)
    data = memory[:size]
    weights = split_bucket(info, data)
    check_names(engine.model, weights, "the bucket")
    # One broadcast of the whole bucket, or one of each tensor; either way into the same memory.
    targets = [data] if body.load_format else list(weights.values())
    try:
        for target in targets:
            await asyncio.to_thread(group.broadcast, target)
    except RuntimeError as error:
        raise EngineError(f"receiving failed: {error}") from error
    return memory, {name: tensor.cpu() for name, tensor in weights.items()}


def _answer(success: bool, message: str) -> web.Response:
    return json_response({"success": success, "message": message}, 200 if success else 400)
