"""A scripted engine as a process of its own: SGLang's calls over HTTP, answers after a log-normal time.

    python benchmarks/load_engine.py --median-s 6 --sigma 0.8 --cap-s 60 --tokens 512 --seed 0

Prints its port. A bare asyncio protocol instead of a web framework: on a small machine an engine must not compete with
the client that is measured. GET /load answers what it has done since it started.
"""

import argparse
import asyncio
import random
import re
import sys
from typing import Any

import orjson

_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)", flags=re.IGNORECASE)
_BACKLOG = 4096


class LoadEngine:
    """Latencies, and how many requests run.

    Args:
        options: ``median_s``, ``sigma`` and ``cap_s`` of the latencies, ``tokens`` of an answer, ``seed``.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._random = options, random.Random(options.seed)
        self._ids = orjson.dumps([2 + k % 1000 for k in range(options.tokens)])
        self.label = "default"
        self._running, self._peak, self._served = 0, 0, 0
        self._busy_s, self._counted_s = 0.0, 0.0

    def latency_s(self) -> float:
        return min(self._options.cap_s, self._options.median_s * self._random.lognormvariate(0.0, self._options.sigma))

    def count(self, change: int) -> None:
        """So many requests more (or fewer) are running."""
        now_s = asyncio.get_running_loop().time()
        self._busy_s += self._running * (now_s - self._counted_s)
        self._counted_s = now_s
        self._running += change
        self._peak = max(self._peak, self._running)
        self._served += change < 0

    def load(self) -> dict[str, float]:
        """``busy_s`` is the integral of running requests over ``at_s``, the engine's own clock."""
        self.count(0)
        return {"busy_s": self._busy_s, "at_s": self._counted_s, "peak": self._peak, "served": self._served}

    def answer(self, rid: str) -> bytes:
        size, label = self._options.tokens, self.label
        meta: dict[str, Any] = {
            "id": rid,
            "finish_reason": {"type": "stop"},
            "weight_version": label,
            "weight_versions": [{"version": label, "start": 0, "end": size}],
            "completion_tokens": size,
        }
        return b'{"text":"","output_ids":' + self._ids + b',"meta_info":' + orjson.dumps(meta) + b"}"

    def control(self, path: str, body: bytes) -> bytes:
        """Everything but /generate, at once."""
        if path == "/load":
            return orjson.dumps(self.load())
        if path == "/update_weights_from_disk":
            self.label = orjson.loads(body)["weight_version"]
        return orjson.dumps({"success": True, "weight_version": self.label})


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time."""

    def __init__(self, engine: LoadEngine) -> None:
        self._engine, self._buffer = engine, b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._engine.count(-1)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        found = _LENGTH.search(head)
        size = int(found[1]) if found else 0
        if len(rest) < size:
            return
        self._buffer = rest[size:]
        path = head.split(b" ", 2)[1].decode()
        if path != "/generate":
            self._send(self._engine.control(path, rest[:size]))
            return
        self._engine.count(1)
        rid = orjson.loads(rest[:size])["rid"]
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._engine.latency_s(), self._finish, rid)

    def _finish(self, rid: str) -> None:
        self._timer = None
        self._engine.count(-1)
        self._send(self._engine.answer(rid))

    def _send(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)


async def serve(options: argparse.Namespace) -> None:
    """Until the process is ended."""
    engine = LoadEngine(options)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", 0, backlog=_BACKLOG)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--median-s", "--sigma", "--cap-s"):
        parser.add_argument(name, type=float, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    asyncio.run(serve(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
