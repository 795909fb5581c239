"""A client that is closed ends all its requests, whatever they wait for."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from rollout_world import run_async

from asympo_megatron.rollout.answer import AnswerReader, GenerateRequest, SamplingParams
from asympo_megatron.rollout.client import EngineClient, EngineLost

PARAMS = SamplingParams(10, 1.0, 1.0, -1, [])


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """The kernel takes connections in, and nobody reads from them: a server that hangs."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        yield listening


async def closed_while_it_waits(listener: socket.socket, tokens: int, waits: Callable[[EngineClient], bool]) -> None:
    """Close the client of an engine that will not answer for ten minutes."""
    client = EngineClient(f"http://127.0.0.1:{listener.getsockname()[1]}", None, 600.0, 600.0)
    request = GenerateRequest("a.", [123456] * tokens, PARAMS, "0")
    asked = asyncio.create_task(client.generate(request, AnswerReader(200_000, {0})))
    while not waits(client):
        await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await client.close()
        with pytest.raises(EngineLost, match="/generate failed"):
            await asked


def acquired(client: EngineClient) -> bool:
    """Whether a connection is made, or being made."""
    connector = client._session.connector
    return connector is not None and bool(connector._acquired)


def test_a_request_that_is_being_sent(listener: socket.socket) -> None:
    """More bytes than the buffers of both ends take: the connection itself stays, the request does not."""
    run_async(closed_while_it_waits(listener, 1_000_000, sending))


def sending(client: EngineClient) -> bool:
    connector = client._session.connector
    assert connector is not None
    transports = [protocol.transport for protocol in connector._acquired if hasattr(protocol, "transport")]
    return any(one is not None and one.get_write_buffer_size() > 0 for one in transports)


def test_a_request_that_is_connecting(listener: socket.socket) -> None:
    with ExitStack() as stack:
        for _ in range(3):  # what the backlog holds, and more: the next connection gets no answer
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        run_async(closed_while_it_waits(listener, 10, acquired))
