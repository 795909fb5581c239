"""What the handlers of one engine share."""

import asyncio
from typing import Any

import msgspec
import torch
from aiohttp import web

from asympo_megatron.engine.model import ServedModel
from asympo_megatron.engine.model_thread import ModelThread
from asympo_megatron.engine.options import EngineOptions
from asympo_megatron.engine.params import BadRequest
from asympo_megatron.engine.scheduler import Scheduler
from asympo_megatron.sync.group import WeightGroup


class Engine:
    """One served model: its thread, its scheduler and the requests that are being answered."""

    def __init__(self, options: EngineOptions, model: ServedModel) -> None:
        self.options = options
        self.model = model
        self.scheduler = Scheduler(model, options.model_path, options.max_running_requests, options.seed)
        self.thread = ModelThread(self.scheduler, options.threads)
        self.live_rids: set[str] = set()
        self.update_lock = asyncio.Lock()
        self.in_session = False
        self.groups: dict[str, WeightGroup] = {}
        self.received = torch.empty(0, dtype=torch.uint8)
        """Memory of the last bucket, for the next one: fresh memory costs half as much as what is received into it."""


ENGINE = web.AppKey("engine", Engine)


def json_response(body: Any, status: int = 200) -> web.Response:
    """An answer in JSON."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


async def read_json(request: web.Request, kind: type) -> Any:
    """The request's body as a struct; an empty body is an empty object.

    Raises:
        BadRequest: not JSON, or fields of a wrong type.
    """
    data = await request.read()
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise BadRequest(f"The request body cannot be read: {error}.") from error
