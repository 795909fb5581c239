"""The virtual clock, the scripted engine by hand, and the arithmetic of benchmarks/async_speedup.py."""

import asyncio
import json
import time
from dataclasses import replace

import async_speedup
import pytest
from decoding_engine import DecodingEngine, EngineModel
from scripted_run import Step

from asympo_megatron.records import VersionSpan
from asympo_megatron.rollout.answer import AnswerReader, GenerateRequest, SamplingParams
from asympo_megatron.testing.virtual_time import run_virtual

SMALL = async_speedup.World(
    engines=2, engine=EngineModel(4, 0.01, 0.001, 0.5), groups_per_step=2, group_size=2, steps=24
)


def test_time_jumps_from_timer_to_timer():
    seen = []

    async def wait(seconds):
        await asyncio.sleep(seconds)
        seen.append((seconds, asyncio.get_running_loop().time()))

    async def scenario():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(50):
                await asyncio.gather(wait(86_400), wait(30), wait(0.5))
        await wait(7)

    started = time.monotonic()
    run_virtual(scenario())
    assert time.monotonic() - started < 10
    assert seen == [(0.5, 0.5), (30, 30.0), (7, 57.0)]


def test_work_for_threads_takes_no_virtual_time():
    async def scenario():
        timer = asyncio.get_running_loop().call_later(1, lambda: None)
        assert await asyncio.to_thread(pow, 2, 10) == 1024
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(divmod, 1, 0)
        timer.cancel()
        return asyncio.get_running_loop().time()

    assert run_virtual(scenario()) == 0.0


def test_a_program_that_would_hang_is_an_error():
    async def scenario():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="every task waits and no timer is set"):
        run_virtual(scenario())


def ask(engine, size):
    params = SamplingParams(size, 1.0, 1.0, -1, [])
    return engine.generate(GenerateRequest(f"run.000001.{size}.0000.0000.", [3], params, "0"), AnswerReader(64, ()))


def test_iterations_of_an_engine_by_hand():
    """10 ms + 1 ms a request: 10 tokens together take 120 ms, the other 10 of the longer one 110 ms."""

    async def scenario():
        engine = DecodingEngine("e", EngineModel(2, 0.010, 0.001, 0.5), lambda _: 20)
        await engine.update_weights("", "4", flush_cache=False, timeout_s=1)
        loop, ends = asyncio.get_running_loop(), []

        async def timed(size):
            await ask(engine, size)
            ends.append(loop.time() - 0.5)

        both = asyncio.gather(timed(10), timed(20))
        await asyncio.sleep(0)
        with pytest.raises(AssertionError, match="2 slots and was sent one more"):
            await ask(engine, 5)
        await both
        return ends, engine.occupancy

    ends, occupancy = run_virtual(scenario())
    assert ends == pytest.approx([0.12, 0.23])
    assert async_speedup.busy_s(occupancy, 0.5, 2.0) == pytest.approx(2 * 0.12 + 0.11)
    assert async_speedup.busy_s(occupancy, 0.6, 0.7) == pytest.approx(2 * 0.02 + 0.08)


def test_tokens_after_an_update_carry_the_new_version():
    """4 tokens, a pause of half a second, 6 more."""

    async def scenario():
        engine = DecodingEngine("e", EngineModel(2, 0.010, 0.0, 0.5), lambda _: 10)
        await engine.update_weights("", "4", flush_cache=False, timeout_s=1)
        asked = asyncio.create_task(ask(engine, 12))
        await asyncio.sleep(0.0405)
        await engine.pause("in_place")
        await engine.update_weights("", "5", flush_cache=False, timeout_s=1)
        await engine.resume()
        answer = await asked
        return answer, asyncio.get_running_loop().time()

    answer, ended = run_virtual(scenario())
    assert answer.versions == [VersionSpan(4, 0, 4), VersionSpan(5, 4, 10)]
    assert (len(answer.ids), answer.finish_reason) == (10, "stop")
    assert ended == pytest.approx(0.5 + 0.1 + 0.5)


def test_the_bound_by_hand():
    """8 requests at 18 ms an iteration: 444.4 tokens/s. 1,000 tokens a step take 2.25 s; the steps took 2.5."""
    world = replace(SMALL, engine=EngineModel(4, 0.01, 0.002, 0.0), learner_over_engines=0.0)
    steps = [Step(2.5 * k, 2.5 * k + 1, (400, 600), 1.0, 2, 1) for k in range(30)]
    course = async_speedup.Course(world, 1, steps, [])
    assert course.step_s == 2.5
    assert course.of_bound == pytest.approx(2.25 / 2.5)
    assert course.facts()["over_bound"] == 0.25
    slow_learner = replace(world, learner_over_engines=1e6)
    assert async_speedup.Course(slow_learner, 1, steps, []).bound_s == slow_learner.train_s()


def test_a_small_run_on_the_real_controller():
    synchronous, again, ahead = (async_speedup.run(SMALL, lag) for lag in (0, 0, 4))
    assert synchronous.steps == again.steps
    for course in (synchronous, ahead):  # every response that was admitted is trained, once
        assert sum(step.tokens for step in course.steps) == SMALL.lengths().sum()
    for step in synchronous.steps:
        idle = [async_speedup.busy_s(engine.occupancy, step.leased_s, step.trained_s) for engine in synchronous.engines]
        assert idle == [0.0, 0.0]
        assert step.lag_max == 0
    assert max(step.lag_max for step in ahead.steps) >= 2
    assert synchronous.step_s > 1.3 * ahead.step_s


def test_a_variation_names_its_parameters_and_has_no_goal(capsys):
    report = async_speedup.harness.Report("trial")
    async_speedup.vary(report, "small", SMALL, 4)
    line = json.loads(capsys.readouterr().out)
    assert (line["variation"], line["goal"], line["max_lag_steps"]) == ("small", None, 4)
    assert line["value"] == pytest.approx(line["synchronous_step_s"] / line["step_s"], rel=0.01)
