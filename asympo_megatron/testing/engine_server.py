"""An embedded engine in a thread of the calling process, for tests."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from asympo_megatron.engine.app import make_app
from asympo_megatron.engine.options import EngineOptions
from asympo_megatron.engine.server import bind, start_runner, url_of

_STOP_TIMEOUT_S = 30.0


@contextmanager
def engine_server(options: EngineOptions) -> Iterator[str]:
    """Serve until the block ends; yields the base URL."""
    listener = bind(options.host, options.port)
    app = make_app(options)
    loop = asyncio.new_event_loop()
    runner = loop.run_until_complete(start_runner(app, listener))
    thread = threading.Thread(target=loop.run_forever, name="engine-loop", daemon=True)
    thread.start()
    try:
        yield url_of(listener)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(_STOP_TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_STOP_TIMEOUT_S)
        loop.close()
