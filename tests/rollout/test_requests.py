"""Requests that are slow, queued or many: aborted and resumed, never a failure of their engine."""

from pathlib import Path
from typing import Any

from rollout_world import VOCAB, changed, run_async, small_config, world

from asympo_megatron.testing.fake_engine import FakeEngine


def test_slow_request_is_aborted_and_resumed(tmp_path: Path) -> None:
    """After request_timeout_s the engine returns what it has, and the response goes on from there."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 3 if body["rid"].endswith(".0000.") else None)
        config = small_config(rollout__request_timeout_s=0.1, rollout__max_lag_steps=0)
        async with world(tmp_path, config, [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            samples = await w.trainer.payload(await w.trainer.lease(0))
            assert [len(sample.ids) for sample in samples] == [7] * 4
            resumed = [body for body in engine.requests if body["rid"].endswith(".0001.")]
            assert sorted(len(body["input_ids"]) for body in resumed) == [6] * 4

    run_async(scenario())


def test_requests_that_expire_in_a_full_queue_are_no_failure(tmp_path: Path) -> None:
    """16 requests wait inside an engine and run out of time together, without a token."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        first: list[str] = []

        def hold(body: dict[str, Any]) -> int | None:
            first.append(body["rid"])
            return 0 if len(first) <= 16 else None

        engine.hold(hold)
        config = small_config(rollout__request_timeout_s=0.2, rollout__max_lag_steps=3)
        async with world(tmp_path, config, [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            for step in range(4):
                assert (await w.trainer.lease(step)).ready
            assert sorted(rid[-6:] for rid in first) == [".0000."] * 16 + [".0001."] * 16
            held = w.controller.parts.fleet.engines[engine.url]
            assert (held.last_error, held.strikes) == ("", 0)
            assert [path for path, _ in engine.calls].count("/update_weights_from_disk") == 1, "not quarantined"

    run_async(scenario())


def test_aborts_without_a_token_that_nobody_asked_for_are_a_failure(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        for _ in range(8):
            engine.misbehave(changed(output_ids=[], meta__weight_versions=[], meta__finish_reason={"type": "abort"}))
        async with world(tmp_path, engines=[engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert (await w.trainer.lease(0)).ready
            assert "aborts requests without a token" in w.controller.parts.fleet.engines[engine.url].last_error

    run_async(scenario())


def test_requests_wait_in_the_controller_and_oldest_groups_go_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda _: 1)
        config = small_config(rollout__max_in_flight_per_engine=3, rollout__max_lag_steps=1)
        async with world(tmp_path, config, [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 3)
            order: list[str] = []
            while len(order) < 8:
                running = sorted(engine.running)
                assert len(running) <= 3
                await engine.release(lambda request, rid=running[0]: request.rid == rid)  # type: ignore[misc]
                order.append(running[0])
                asked = min(8, 3 + len(order))
                await engine.until(lambda asked=asked: len(engine.requests) == asked)  # type: ignore[misc]
                await engine.until(lambda rid=running[0]: rid not in engine.running)  # type: ignore[misc]
            assert order == sorted(order)

    run_async(scenario())


def test_groups_stay_together_and_load_is_shared(tmp_path: Path) -> None:
    async def scenario() -> None:
        engines = [FakeEngine(VOCAB), FakeEngine(VOCAB)]
        for engine in engines:
            engine.hold(lambda _: 1)
        config = small_config(batch__group_size=4, rollout__max_lag_steps=1)
        async with world(tmp_path, config, engines) as w:
            await w.trainer.attach()
            await w.until(lambda: len(w.controller.parts.fleet.engines) == 2)
            gates = [engine.hold_updates() for engine in engines]
            await w.trainer.publish(0)
            for engine in engines:
                await engine.until(lambda e=engine: ("/pause_generation", {"mode": "abort"}) in e.calls)  # type: ignore[misc]
            for gate in gates:
                gate.set()
            await w.until(lambda: w.controller.parts.fleet.in_flight == 16)
            for engine in engines:
                await engine.release()
            for step in range(2):
                await w.trainer.lease(step)
            placed = [{body["rid"].split(".")[2] for body in engine.requests} for engine in engines]
            assert all(placed), "both engines work"
            assert len(placed[0] & placed[1]) <= 1, "a group shares the prefix cache of one engine"

    run_async(scenario())
