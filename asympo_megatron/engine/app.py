"""The aiohttp application of one engine."""

import hmac
import logging

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from asympo_megatron.engine import collective, control, info, tensors
from asympo_megatron.engine.generate import abort_request, generate
from asympo_megatron.engine.model import ServedModel, load_model
from asympo_megatron.engine.options import EngineOptions
from asympo_megatron.engine.params import BadRequest
from asympo_megatron.engine.state import ENGINE, Engine, json_response
from asympo_megatron.errors import EngineError

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 256 << 20


def make_app(options: EngineOptions, model: ServedModel | None = None) -> web.Application:
    """Build the application; its model thread lives from start-up to shutdown.

    Args:
        options: what to serve. ``host`` and ``port`` are the caller's business.
        model: an already loaded model; None loads it from ``options``.

    Raises:
        EngineError: the model cannot be loaded.
    """
    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_guard(options.api_key)])
    app[ENGINE] = Engine(options, model if model is not None else load_model(options))
    app.on_startup.append(_start_thread)
    app.on_shutdown.append(_stop_thread)
    _add_routes(app)
    return app


def _add_routes(app: web.Application) -> None:
    get, post = app.router.add_get, app.router.add_post
    for path in ("/health", "/health_generate"):
        get(path, info.health)
    get("/ready", info.ready)
    for path in ("/model_info", "/get_model_info"):
        get(path, info.model_info)
    for path in ("/server_info", "/get_server_info"):
        get(path, info.server_info)
    get("/v1/models", info.models)
    get("/v1/loads", info.loads)
    get("/flush_cache", control.flush_cache)
    get("/get_weights_by_name", control.get_weights_by_name)
    post("/get_weights_by_name", control.get_weights_by_name)
    post("/generate", generate)
    post("/abort_request", abort_request)
    post("/flush_cache", control.flush_cache)
    post("/pause_generation", control.pause_generation)
    post("/continue_generation", control.continue_generation)
    post("/update_weights_from_disk", control.update_weights_from_disk)
    post("/update_weight_version", control.update_weight_version)
    post("/weights_checker", control.weights_checker)
    post("/begin_weight_update", control.begin_weight_update)
    post("/end_weight_update", control.end_weight_update)
    post("/release_memory_occupation", control.release_memory_occupation)
    post("/resume_memory_occupation", control.resume_memory_occupation)
    post("/init_weights_update_group", collective.init_group)
    post("/destroy_weights_update_group", collective.destroy_group)
    post("/update_weights_from_distributed", collective.update_from_distributed)
    post("/update_weights_from_tensor", tensors.update_from_tensor)


async def _start_thread(app: web.Application) -> None:
    app[ENGINE].thread.start()


async def _stop_thread(app: web.Application) -> None:
    # On shutdown, not on clean-up: clean-up first waits for the requests that only this thread can finish.
    app[ENGINE].thread.stop()


def _guard(api_key: str | None) -> Middleware:
    """Check the key and turn every exception into the JSON that the real server would answer."""
    expected = f"Bearer {api_key}".encode()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if api_key is not None and not request.path.startswith("/health"):
            given = request.headers.get("Authorization", "").encode(errors="replace")
            if not hmac.compare_digest(given, expected):
                return json_response({"error": "Unauthorized"}, 401)
        try:
            return await handler(request)
        except BadRequest as error:
            return json_response(error.body, 400)
        except web.HTTPException as error:
            return json_response({"detail": error.reason}, error.status)
        except EngineError as error:
            status = 500 if request.app[ENGINE].thread.alive else 503
            return json_response({"error": {"message": str(error)}}, status)
        except Exception as error:
            logger.exception("%s failed", request.path)
            return json_response({"error": {"message": f"{type(error).__name__}: {error}"}}, 500)

    return guard
