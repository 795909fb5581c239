"""Endpoints that pause, flush and change weights."""

import asyncio
import hashlib
from typing import Any

import msgspec
from aiohttp import web

from asympo_megatron.engine.model import read_weights
from asympo_megatron.engine.params import BadRequest
from asympo_megatron.engine.scheduler import PAUSE_MODES
from asympo_megatron.engine.state import ENGINE, Engine, json_response, read_json
from asympo_megatron.errors import EngineError

_FLUSH_POLL_S = 0.02
_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


class PauseBody(msgspec.Struct, frozen=True):
    mode: str = "abort"


class DiskUpdateBody(msgspec.Struct, frozen=True):
    model_path: str
    weight_version: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    load_format: str | None = None


class RelabelBody(msgspec.Struct, frozen=True):
    new_version: str
    abort_all_requests: bool = True


class CheckerBody(msgspec.Struct, frozen=True):
    action: str = "checksum"


async def flush_cache(request: web.Request) -> web.Response:
    """There is no prefix cache to flush: says whether a real server could have flushed its own now."""
    engine = request.app[ENGINE]
    try:
        wait_s = float(request.query.get("timeout", 0))
    except ValueError as error:
        raise BadRequest(f"timeout is {request.query['timeout']!r}; expected seconds.") from error
    deadline = asyncio.get_running_loop().time() + wait_s
    while not await engine.thread.call(engine.scheduler.can_flush):
        if asyncio.get_running_loop().time() >= deadline:
            return web.Response(text="Flush cache failed.\n", status=400)
        await asyncio.sleep(_FLUSH_POLL_S)
    return web.Response(text=_FLUSHED)


async def pause_generation(request: web.Request) -> web.Response:
    """Hold generation: abort, retract or freeze (in_place) what runs."""
    engine = request.app[ENGINE]
    body = await read_json(request, PauseBody)
    if body.mode not in PAUSE_MODES:
        raise BadRequest(f"mode is {body.mode!r}; expected one of {', '.join(PAUSE_MODES)}.")
    await engine.thread.call(engine.scheduler.pause, body.mode)
    return json_response({"message": "Generation paused successfully.", "status": "ok"})


async def continue_generation(request: web.Request) -> web.Response:
    """End a pause."""
    engine = request.app[ENGINE]
    await engine.thread.call(engine.scheduler.resume)
    return json_response({"message": "Generation continued successfully.", "status": "ok"})


async def update_weights_from_disk(request: web.Request) -> web.Response:
    """Load, check, and only then replace the weights; 400 and nothing changed when anything is wrong."""
    engine = request.app[ENGINE]
    body = await read_json(request, DiskUpdateBody)
    if body.abort_all_requests:
        await engine.thread.call(engine.scheduler.abort, "", True)
    try:
        if (body.load_format or engine.options.load_format) == "dummy":
            raise EngineError("load_format is dummy, which reads no files; say load_format: auto.")
        async with engine.update_lock:
            weights = await asyncio.to_thread(read_weights, engine.model, body.model_path)
            await engine.thread.update(weights, body.model_path, body.weight_version, body.flush_cache)
    except EngineError as error:
        return json_response({"success": False, "message": str(error), "num_paused_requests": 0}, 400)
    message = "Succeeded to update model weights."
    if body.weight_version is not None:
        message += f" Weight version updated to {body.weight_version}."
    return json_response({"success": True, "message": message, "num_paused_requests": 0})


async def update_weight_version(request: web.Request) -> web.Response:
    """Change the label alone."""
    engine = request.app[ENGINE]
    body = await read_json(request, RelabelBody)
    if body.abort_all_requests:
        await engine.thread.call(engine.scheduler.abort, "", True)
    await engine.thread.call(engine.scheduler.relabel, body.new_version)
    message = f"Weight version updated to {body.new_version}"
    return json_response({"success": True, "message": message, "new_version": body.new_version})


async def weights_checker(request: web.Request) -> web.Response:
    """Checksums of the served tensors, by Hugging Face name (a real server names its own fused ones)."""
    engine = request.app[ENGINE]
    body = await read_json(request, CheckerBody)
    if body.action != "checksum":
        raise BadRequest(f"action is {body.action!r}; the embedded engine knows only checksum.")
    checksums = await engine.thread.call(engine.scheduler.checksums)
    whole = hashlib.sha256("".join(f"{name}{value}" for name, value in sorted(checksums.items())).encode()).hexdigest()
    layout = {"role": "target", "rank": 0, "size": 1}
    for axis in ("tp", "dp", "pp"):
        layout |= {f"{axis}_rank": 0, f"{axis}_size": 1}
    rank = {"checksums": checksums, "per_gpu_checksum": whole, "parallelism_info": [layout]}
    engine_checksum = hashlib.sha256(whole.encode()).hexdigest()
    return json_response(
        {"success": True, "message": "Success.", "ranks": [rank], "per_engine_checksum": engine_checksum}
    )


async def begin_weight_update(request: web.Request) -> web.Response:
    """Open a session. Disk updates need none; a second one is refused."""
    return _session(request.app[ENGINE], begin=True)


async def end_weight_update(request: web.Request) -> web.Response:
    """Close the session."""
    return _session(request.app[ENGINE], begin=False)


def _session(engine: Engine, begin: bool) -> web.Response:
    if engine.in_session is begin:
        message = (
            "a weight-update session is already open; call end_weight_update() first"
            if begin
            else "no weight-update session is open; call begin_weight_update() first"
        )
        return _refusal(message)
    engine.in_session = begin
    return json_response({"success": True, "message": "Success"})


async def get_weights_by_name(_: web.Request) -> web.Response:
    """Refused, as the recorded server does."""
    raise BadRequest("Get parameter by name failed")


async def release_memory_occupation(request: web.Request) -> web.Response:
    """Hold generation until the memory is resumed. On a CPU there is nothing to give back."""
    engine = request.app[ENGINE]
    try:
        await engine.thread.call(engine.scheduler.release_memory)
    except EngineError as error:
        raise BadRequest(str(error)) from error
    return json_response(None)


async def resume_memory_occupation(request: web.Request) -> web.Response:
    """Let generation go on."""
    engine = request.app[ENGINE]
    await engine.thread.call(engine.scheduler.resume_memory)
    return json_response(None)


def _refusal(message: str) -> web.Response:
    body: dict[str, Any] = {"success": False, "message": message}
    return json_response(body, 400)
