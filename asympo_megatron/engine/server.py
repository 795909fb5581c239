"""An embedded engine as a process: bind, load, serve, stop on a signal."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable

from aiohttp import web
from transformers.utils.logging import disable_progress_bar

from asympo_megatron.engine.app import make_app
from asympo_megatron.engine.options import EngineOptions
from asympo_megatron.errors import EngineError

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_SHUTDOWN_TIMEOUT_S = 2.0


def serve(options: EngineOptions, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        options: the engine's options.
        on_ready: called once with the base URL, when requests are accepted.

    Raises:
        EngineError: the port is taken, or the model cannot be loaded.
    """
    disable_progress_bar()
    # Bound before the model is loaded, so that a taken port is known at once; connections are refused until then.
    with bind(options.host, options.port) as listener:
        app = make_app(options)
        asyncio.run(_serve(app, listener, on_ready))


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet.

    Raises:
        EngineError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise EngineError(
            f"the engine cannot bind port {port} of {host}: {error.strerror}. "
            "Set the engine's port to a free one, or to 0 for any."
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Base URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def start_runner(app: web.Application, listener: socket.socket) -> web.AppRunner:
    """Start answering on a bound socket; a client that hangs up cancels its request."""
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_TIMEOUT_S, keepalive_timeout=120
    )
    await runner.setup()
    await web.SockSite(runner, listener, backlog=_BACKLOG).start()
    return runner


async def _serve(app: web.Application, listener: socket.socket, on_ready: Callable[[str], None] | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = await start_runner(app, listener)
    logger.info("engine ready on %s", url_of(listener))
    if on_ready is not None:
        on_ready(url_of(listener))
    await stop.wait()
    logger.info("engine stops")
    await runner.cleanup()
