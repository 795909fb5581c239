"""Engines that hang, in part or as a whole, and engines that are merely slow."""

import asyncio
from pathlib import Path
from typing import Any

from rollout_world import VOCAB, run_async, small_config, world

from asympo_megatron.rollout.fleet import EngineState
from asympo_megatron.testing.fake_engine import FakeEngine


def test_hung_engine_loses_its_requests(tmp_path: Path) -> None:
    """It accepts connections but answers nothing: the health check ends it, and its requests go elsewhere."""

    async def scenario() -> None:
        hung, other = FakeEngine(VOCAB), FakeEngine(VOCAB)
        hung.hold(lambda _: 1)
        config = small_config(rollout__engine_timeout_s=1.0)
        async with world(tmp_path, config, [hung, other]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await hung.until(lambda: len(hung.running) >= 2)
            silence = asyncio.Event()

            async def mute(path: str, body: dict[str, Any]) -> None:
                await silence.wait()

            hung._note = mute  # type: ignore[method-assign]
            for step in range(2):
                assert (await w.trainer.lease(step)).ready
            held = w.controller.parts.fleet.engines[hung.url]
            assert "/model_info failed (TimeoutError)" in held.last_error
            silence.set()

    run_async(scenario())


def test_hung_engine_is_found_within_engine_timeout_s(tmp_path: Path) -> None:
    """Silence is counted from the last answer: one question after a quarter of the time, three quarters to answer."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        async with world(tmp_path, small_config(rollout__engine_timeout_s=1.0), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            held = w.controller.parts.fleet.engines[engine.url]
            await w.until(lambda: held.serving)
            silence, asked = asyncio.Event(), []

            async def mute(path: str, body: dict[str, Any]) -> None:
                asked.append(path)
                await silence.wait()

            engine._note = mute  # type: ignore[method-assign]
            loop = asyncio.get_running_loop()
            begin_s = loop.time()
            await w.until(lambda: held.state is EngineState.QUARANTINED)
            assert loop.time() - begin_s < 3.0, "three tries of 1 s each would take longer"
            assert asked.count("/model_info") == 1
            assert "/model_info failed (TimeoutError)" in held.last_error
            silence.set()

    run_async(scenario())


def test_engine_that_hangs_in_a_pause_is_asked_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine, other = FakeEngine(VOCAB), FakeEngine(VOCAB)
        async with world(tmp_path, small_config(rollout__engine_timeout_s=1.0), [engine, other]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            held = w.controller.parts.fleet.engines[engine.url]
            await w.until(lambda: held.serving)
            silence, note, asked = asyncio.Event(), engine._note, []

            async def mute(path: str, body: dict[str, Any]) -> None:
                asked.append(path)
                await (silence.wait() if path == "/pause_generation" else note(path, body))

            engine._note = mute  # type: ignore[method-assign]
            await w.trainer.publish(1)
            await w.until(lambda: held.state is EngineState.QUARANTINED)
            assert "/pause_generation failed (TimeoutError)" in held.last_error
            assert asked.count("/pause_generation") == 1, "every further try would take engine_timeout_s again"
            silence.set()

    run_async(scenario())


def test_engine_that_answers_but_generates_nothing_is_taken_out(tmp_path: Path) -> None:
    """Labels, pauses and loads go well, requests stay: it is asked for a token, no request before."""

    async def scenario() -> None:
        hanging, other = FakeEngine(VOCAB), FakeEngine(VOCAB)
        hanging.hangs = True
        config = small_config(rollout__engine_timeout_s=1.0, rollout__request_timeout_s=60.0)
        async with world(tmp_path, config, [hanging, other]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            for step in range(2):
                assert (await w.trainer.lease(step)).ready
            held = w.controller.parts.fleet.engines[hanging.url]
            asked = len(hanging.requests)
            assert asked > 0
            await w.until(lambda: held.state is EngineState.EVICTED)
            assert "generates nothing: /health_generate answered HTTP 503" in held.last_error
            assert len(hanging.requests) == asked, "requests went to an engine that had not shown that it generates"

    run_async(scenario())


def test_slow_request_on_an_engine_that_generates_stays(tmp_path: Path) -> None:
    """Nothing is answered for longer than engine_timeout_s, but tokens come out: the engine stays in service."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda _: 1)
        async with world(tmp_path, small_config(rollout__engine_timeout_s=1.0), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: [path for path, _ in engine.calls].count("/health_generate") >= 5)
            await engine.release()
            assert (await w.trainer.lease(0)).ready
            assert w.controller.parts.fleet.engines[engine.url].quarantines == 0
            assert [path for path, _ in engine.calls].count("/update_weights_from_disk") == 1
            assert not any(path == "/abort_request" and body["rid"].count(".") > 1 for path, body in engine.calls)

    run_async(scenario())


def test_engine_that_failed_its_health_check_comes_back(tmp_path: Path) -> None:
    """A real server is not ready, whatever it could do, until a health check has seen a token."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hangs = True
        config = small_config(rollout__engine_timeout_s=1.0, rollout__request_timeout_s=60.0)
        async with world(tmp_path, config, [engine]) as w:
            held = w.controller.parts.fleet.engines[engine.url]
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: engine.unhealthy)
            await w.until(lambda: held.quarantines > 0)
            engine.hangs = False
            assert (await w.trainer.lease(0)).ready
            assert not engine.unhealthy

    run_async(scenario())


def test_engine_that_stops_while_it_loads_is_found_within_engine_timeout_s(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine, other = FakeEngine(VOCAB), FakeEngine(VOCAB)
        config = small_config(rollout__engine_timeout_s=1.0, sync__timeout_s=600.0)
        async with world(tmp_path, config, [engine, other]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            held = w.controller.parts.fleet.engines[engine.url]
            await w.until(lambda: held.serving)
            silence, note = asyncio.Event(), engine._note

            async def mute(path: str, body: dict[str, Any]) -> None:
                await (note(path, body) if path == "/pause_generation" else silence.wait())

            engine._note = mute  # type: ignore[method-assign]
            await w.trainer.publish(1)
            await w.until(lambda: held.state is EngineState.QUARANTINED)
            assert "/model_info failed (TimeoutError)" in held.last_error
            silence.set()

    run_async(scenario())


def test_engine_that_loads_for_longer_than_engine_timeout_s_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        config = small_config(rollout__engine_timeout_s=1.0)
        async with world(tmp_path, config, [engine]) as w:
            gate = engine.hold_updates()
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: [path for path, _ in engine.calls].count("/model_info") == 6)
            gate.set()
            held = w.controller.parts.fleet.engines[engine.url]
            await w.until(lambda: held.serving)
            assert held.quarantines == 0

    run_async(scenario())
