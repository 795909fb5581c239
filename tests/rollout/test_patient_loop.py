"""The clock of the tests' loop: what runs out, and what does not."""

import asyncio
import time
from typing import Any

import pytest
from patient_loop import PatientLoop


def run_on(loop_factory: Any, work: Any) -> Any:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(work)


async def starved() -> None:
    """A callback that takes longer than the deadline of what waits beside it."""
    async with asyncio.timeout(0.05):
        asyncio.get_running_loop().call_soon(spin, 0.1)
        reader, writer = await asyncio.open_connection("127.0.0.1", await echo_port())
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        writer.close()


async def echo_port() -> int:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        spin(0.1)
        writer.write(await reader.readexactly(1))
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1")
    port: int = server.sockets[0].getsockname()[1]
    return port


def spin(seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        pass


def test_a_busy_process_has_time() -> None:
    run_on(PatientLoop, starved())
    with pytest.raises(TimeoutError):
        run_on(asyncio.SelectorEventLoop, starved())


def test_what_never_comes_runs_out_of_time() -> None:
    async def waits() -> None:
        async with asyncio.timeout(0.05):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        run_on(PatientLoop, waits())


def test_a_loop_that_never_rests_runs_out_of_time() -> None:
    async def turns() -> None:
        async with asyncio.timeout(0.05):
            while True:
                await asyncio.sleep(0)

    with pytest.raises(TimeoutError):
        run_on(PatientLoop, turns())


def test_a_thread_is_waited_for() -> None:
    async def calls() -> str:
        return await asyncio.to_thread(lambda: "done")

    assert run_on(PatientLoop, calls()) == "done"
