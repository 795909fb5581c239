"""benchmarks/controller_load.py: its arithmetic, and one stretch of each client against a real scripted engine."""

import asyncio
from dataclasses import replace

import controller_load
import pytest
from controller_load import QUICK, Reading

SMALL = replace(QUICK, in_flight=8, measured=16)


def reading(k, **changes):
    """100 of 4 x 32 slots busy for k seconds; 40 bytes a request on 1 MB."""
    base = Reading(busy_s=100.0 * k, at_s=4.0 * k, served=50 * k, peak=32, cpu_s=0.0, resident_bytes=10**6 + 2000 * k)
    return replace(base, **changes)


def test_occupancy_by_hand():
    assert controller_load.occupancy(reading(3), reading(9), 32) == pytest.approx(100 / 128)


def test_growth_is_a_slope_and_not_a_jump():
    steady = [reading(k) for k in range(20)]
    assert controller_load.growth(steady) == pytest.approx(40.0)
    one_spike = [reading(k, resident_bytes=10**6 + 10**5 * (k == 10)) for k in range(21)]
    assert controller_load.growth(one_spike) == pytest.approx(0.0, abs=1e-6)


def test_all_clients_get_answers_and_keep_to_the_slots():
    async def scenario(urls):
        seconds = []
        async with controller_load.our_client(urls, SMALL.slots) as sample:
            seconds.append(await controller_load.stretch(sample, 12, SMALL.in_flight, SMALL.measured))
        ours = [await load(url) for url in urls]
        for client in (controller_load.checking_client, controller_load.bare_client):
            async with client(urls) as sample:
                seconds.append(await controller_load.stretch(sample, SMALL.in_flight, SMALL.in_flight, SMALL.measured))
        return seconds, ours, [await load(url) for url in urls]

    async def load(url):
        async with controller_load.aiohttp.ClientSession() as session, session.get(url + "/load") as reply:
            return controller_load.orjson.loads(await reply.read())

    with controller_load.engines(0.01, 0.5, 0.05) as urls:
        seconds, ours, every = asyncio.run(scenario(urls))
    assert min(seconds) > 0
    assert max(one["peak"] for one in ours) <= SMALL.slots
    least = SMALL.in_flight + SMALL.measured
    assert sum(one["served"] for one in ours) >= least
    assert sum(one["served"] for one in every) >= 3 * least
