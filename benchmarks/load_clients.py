"""The clients that controller_load.py compares, and what they are measured by.

whole path (requester, fleet, engine client)   >   engine client alone   >   a bare loop that posts and reads
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import orjson
from scripted_run import VOCABULARY, CountingTask

from asympo_megatron.rollout.admission import LagRule
from asympo_megatron.rollout.answer import AnswerReader, GenerateRequest, SamplingParams, request_id
from asympo_megatron.rollout.bell import Bell
from asympo_megatron.rollout.client import EngineClient
from asympo_megatron.rollout.fleet import Engine, EngineState, Fleet
from asympo_megatron.rollout.requester import Draft, Requester
from asympo_megatron.rollout.rows import VersionRow

GROUP_SIZE = 8
PROMPT_TOKENS, RESPONSE_TOKENS = 128, 512
PARAMS = SamplingParams(1024, 1.0, 1.0, -1, [1])
Sample = Callable[[int], Awaitable[object]]
"""Sample a response for task k."""


async def stretch(sample: Sample, tasks: int, in_flight: int, count: int) -> float:
    """CPU seconds of ``count`` requests in the midst of a steady stream of ``tasks`` tasks."""
    done, marks = 0, []

    async def work(task: int) -> None:
        nonlocal done
        while len(marks) < 2:
            await sample(task)
            done += 1
            if done in (in_flight, in_flight + count):
                marks.append(time.process_time())

    await asyncio.gather(*(work(task) for task in range(tasks)))
    return marks[1] - marks[0]


@contextlib.asynccontextmanager
async def our_client(urls: list[str], slots: int) -> AsyncIterator[Sample]:
    """The path of a request through the controller, without the groups around it; ``slots`` of an engine."""
    bell, weights = Bell(), VersionRow(0, 0, 1, "weights-0", "weights/0")
    fleet = Fleet(slots, GROUP_SIZE, bell)
    for url in urls:
        client = EngineClient(url, None, request_timeout_s=600.0, control_timeout_s=60.0)
        fleet.engines[url] = Engine(url, client, EngineState.SERVING, weights)
        await client.update_weights(weights.path, str(weights.version), flush_cache=False, timeout_s=60.0)
    rule = LagRule(1 << 20, 1, 1 << 20)

    def may_sample(group: int) -> bool:
        step = fleet.step
        return step is not None and rule.may_sample(step, group)

    requester = Requester(fleet, bell, may_sample, {0}, VOCABULARY, lambda: ("load.", 1), logprobs=False)
    numbers = itertools.count()
    prompt_ids = CountingTask(PROMPT_TOKENS).train_prompt(0).ids

    async def sample(_: int) -> None:
        group, row = divmod(next(numbers), GROUP_SIZE)
        await requester.sample(Draft(group, f"{group:09d}", row, prompt_ids, PARAMS))
        if row == GROUP_SIZE - 1:
            fleet.forget_group(group)

    yield sample
    for engine in fleet.engines.values():
        await engine.client.close()


@contextlib.asynccontextmanager
async def checking_client(urls: list[str]) -> AsyncIterator[Sample]:
    """The engine client alone, on a fixed number of tasks."""
    clients = [EngineClient(url, None, request_timeout_s=600.0, control_timeout_s=60.0) for url in urls]
    for client in clients:
        await client.update_weights("weights/0", "0", flush_cache=False, timeout_s=60.0)
    reader, numbers = AnswerReader(VOCABULARY, {0}), itertools.count()
    prompt_ids = CountingTask(PROMPT_TOKENS).train_prompt(0).ids

    async def sample(task: int) -> None:
        rid = request_id("load.", 1, f"{next(numbers):09d}", 0, 0)
        await clients[task % len(clients)].generate(GenerateRequest(rid, prompt_ids, PARAMS, "0"), reader)

    yield sample
    for client in clients:
        await client.close()


@contextlib.asynccontextmanager
async def bare_client(urls: list[str]) -> AsyncIterator[Sample]:
    """Post, read, nothing else; with the session options of our client."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"Content-Type": "application/json"},
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
    )
    addresses = [url + "/generate" for url in urls]
    params = {"max_new_tokens": PARAMS.max_new_tokens, "temperature": 1.0, "top_p": 1.0, "top_k": -1}
    prompt_ids = CountingTask(PROMPT_TOKENS).train_prompt(0).ids

    async def sample(task: int) -> None:
        body = {"rid": str(task), "input_ids": prompt_ids, "sampling_params": params}
        async with session.post(addresses[task % len(addresses)], data=orjson.dumps(body)) as reply:
            answer = orjson.loads(await reply.read())
        assert len(answer["output_ids"]) == RESPONSE_TOKENS

    async with session:
        yield sample
