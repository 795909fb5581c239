"""Weights that a process of this machine hands over as tensors, by value or by the name of its memory."""

import msgspec
from aiohttp import web

from asympo_megatron.config.limits import is_loopback
from asympo_megatron.engine.model import check_names
from asympo_megatron.engine.state import ENGINE, json_response, read_json
from asympo_megatron.errors import EngineError
from asympo_megatron.sync.handles import open_message

_LOAD_FORMATS = (None, "flattened_bucket")


class TensorUpdateBody(msgspec.Struct, frozen=True):
    serialized_named_tensors: list[str]
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


async def update_from_tensor(request: web.Request) -> web.Response:
    """Copy tensors into the served weights; refused at once outside a session, and from another machine."""
    engine = request.app[ENGINE]
    body = await read_json(request, TensorUpdateBody)
    if not engine.in_session:
        return _refusal("update_weights_from_tensor must run between begin_weight_update() and end_weight_update()")
    if not is_loopback(request.remote or ""):
        return _refusal(f"update_weights_from_tensor is answered to processes of this machine, not to {request.remote}")
    if body.load_format not in _LOAD_FORMATS or len(body.serialized_named_tensors) != 1:
        return _refusal(
            f"load_format is {body.load_format!r} with {len(body.serialized_named_tensors)} entries; expected "
            "flattened_bucket, or none, with one entry: the embedded engine has one rank"
        )
    if body.abort_all_requests:
        await engine.thread.call(engine.scheduler.abort, "", True)
    try:
        async with engine.update_lock:
            weights = open_message(body.serialized_named_tensors[0], body.load_format)
            check_names(engine.model, weights, "the message")
            path = engine.scheduler.model_path
            await engine.thread.update(weights, path, body.weight_version, body.flush_cache)
    except EngineError as error:
        return _refusal(f"Failed to update parameter online: {error}")
    message = "Success"
    if body.weight_version is not None:
        message += f" Weight version updated to {body.weight_version}."
    return json_response({"success": True, "message": message})


def _refusal(message: str) -> web.Response:
    return json_response({"success": False, "message": message}, 400)
