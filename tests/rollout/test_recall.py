"""Thousands of requests behind a router that are ended together, on a virtual clock."""

import asyncio
from types import SimpleNamespace

from asympo_megatron.rollout.client import _Limit
from asympo_megatron.rollout.fleet import EngineState
from asympo_megatron.rollout.router import RouterClient
from asympo_megatron.testing.virtual_time import run_virtual

TELLING_S, PATIENCE_S = 0.5, 1.0


class Engine:
    """Takes a while to be told that a request shall end, and then gives back what it has."""

    def __init__(self):
        self.state, self.failure, self.client = EngineState.SERVING, None, self
        self.given_back = {}

    async def abort(self, rid):
        await asyncio.sleep(TELLING_S)
        self.given_back[rid].set()


async def ask(client, engine, rid):
    """As a request does; whether it came back with its tokens."""
    limit = _Limit(client, rid)
    engine.given_back[rid] = asyncio.Event()
    client._expiry.add(limit)
    try:
        async with limit.deadline:
            await engine.given_back[rid].wait()
    except TimeoutError:
        return False
    finally:
        client._expiry.remove(limit)
    return True


async def recalled(count, times):
    engine = Engine()
    client = RouterClient("http://r", None, 600.0, PATIENCE_S, SimpleNamespace(engines={"e": engine}))
    asked = [asyncio.create_task(ask(client, engine, f"{k}.")) for k in range(count)]
    await asyncio.sleep(0)
    for _ in range(times):
        client.recall()
    came_back = await asyncio.gather(*asked)
    await client.close()
    return sum(came_back)


def test_each_has_its_time_to_come_back_once_it_is_told():
    assert run_virtual(recalled(1000, times=1)) == 1000


def test_two_recalls_at_a_time_wait_for_neither():
    assert run_virtual(recalled(1000, times=2)) == 1000
