"""Requests that are slow, queued or many: aborted and resumed, never a failure of their engine."""

import asyncio
from pathlib import Path
from typing import Any

from rollout_world import VOCAB, changed, run_async, small_config, world

from asympo_megatron.rollout.answer import SamplingParams
from asympo_megatron.rollout.bell import Bell
from asympo_megatron.rollout.fleet import Engine, EngineState, Fleet
from asympo_megatron.rollout.requester import Draft, Requester
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.testing.fake_engine import FakeEngine


def test_slow_request_is_aborted_and_resumed(tmp_path: Path) -> None:
    """After request_timeout_s the engine returns what it has, and the response goes on from there."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 3 if body["rid"].endswith(".0000.") else None)
        config = small_config(rollout__request_timeout_s=0.5, rollout__max_lag_steps=0)
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
        config = small_config(rollout__request_timeout_s=1.0, rollout__max_lag_steps=3)
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


def make_fleet(slots: int) -> Fleet:
    """Two engines that serve, with groups of four in mind."""
    fleet = Fleet(slots, 4, Bell())
    for url in ("a", "b"):
        fleet.engines[url] = Engine(url, None, EngineState.SERVING, VersionRow(0, 0, 1, "", ""))  # type: ignore[arg-type]
    return fleet


def test_groups_stay_together_and_load_is_shared() -> None:
    async def scenario() -> list[list[str]]:
        fleet = make_fleet(slots=8)
        return [[(await fleet.acquire(group)).url for _ in range(4)] for group in range(4)]

    assert run_async(scenario()) == [["a"] * 4, ["b"] * 4, ["a"] * 4, ["b"] * 4]


def test_a_group_moves_when_its_engine_is_full_gone_or_far_busier() -> None:
    async def scenario() -> None:
        fleet = make_fleet(slots=3)
        assert [(await fleet.acquire(7)).url for _ in range(5)] == ["a", "a", "a", "b", "b"], "a is full"

        fleet = make_fleet(slots=64)
        first = await fleet.acquire(7)
        fleet.set_state(first, EngineState.QUARANTINED)
        assert (await fleet.acquire(7)).url == "b"

        fleet = make_fleet(slots=64)
        first = await fleet.acquire(7)
        first.in_flight = 5
        assert (await fleet.acquire(7)).url == "b", "five requests more than on the other"

    run_async(scenario())


def test_slots_go_to_the_oldest_group_and_those_of_cancelled_requests_to_the_next() -> None:
    async def scenario() -> list[int]:
        fleet, got = make_fleet(slots=1), []
        busy = [await fleet.acquire(0), await fleet.acquire(0)]

        async def wait(group: int) -> None:
            await fleet.acquire(group)
            got.append(group)

        waiting = {group: asyncio.create_task(wait(group)) for group in (9, 3, 5)}
        await asyncio.sleep(0)
        waiting[3].cancel()
        for engine in busy:
            fleet.release(engine)
        await asyncio.gather(*waiting.values(), return_exceptions=True)
        return got

    assert run_async(scenario()) == [5, 9]


def test_requests_held_back_by_the_lag_rule_cost_one_question_a_ring() -> None:
    """After a resume thousands may wait, and every finished group rings."""

    async def scenario() -> None:
        bell, asked, bound, gone = Bell(), [], [5], []

        def may_sample(group: int) -> bool:
            asked.append(group)
            return group < bound[0]

        class Allowed(Fleet):
            async def acquire(self, group: int, version: int | None = None) -> Engine:
                gone.append(group)
                return await asyncio.Event().wait()  # type: ignore[return-value]

        requester = Requester(Allowed(1, 1, bell), bell, may_sample, {0}, VOCAB, lambda: ("r.", 1), logprobs=False)
        params = SamplingParams(8, 1.0, 1.0, -1, [1])
        drafts = [Draft(group, f"{group}", row, [3], params) for group in (9, 6, 5, 4) for row in range(3)]
        tasks = [asyncio.create_task(requester.sample(draft)) for draft in drafts]
        await asyncio.sleep(0)
        assert gone == [4] * 3
        tasks[3].cancel()
        asked.clear()
        for _ in range(10):
            bell.ring()
        assert asked == [5] * 10
        bound[0] = 7
        bell.ring()
        await asyncio.sleep(0)
        assert sorted(gone) == [4] * 3 + [5] * 3 + [6] * 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run_async(scenario())
