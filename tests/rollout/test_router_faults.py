"""Engines that fail behind a router: the right one is found, and none of its doubtful answers is trained."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_router import FakeRouter, calls, each, expected, fleet, routed_world, train
from rollout_world import VOCAB, changed, labels, run_async

from asympo_megatron.rollout.fleet import EngineState
from asympo_megatron.testing.fake_engine import FakeEngine

FAST = {"rollout__engine_timeout_s": 1.0}


def test_answers_of_weights_that_failed_are_nobodys(tmp_path: Path) -> None:
    """The update of an engine fails half way. Told to go on, it answers what waited in it, under its old label."""

    async def scenario() -> None:
        router = FakeRouter()
        engines = [FakeEngine(VOCAB), FakeEngine(VOCAB)]
        broken = engines[0]
        broken.hold(lambda _: 1)
        async with routed_world(tmp_path, router, engines) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await broken.until(lambda: len(broken.running) >= 2)
            held = len(broken.running)
            label = broken.label
            broken.hold(lambda _: None)
            for _ in range(held):
                broken.misbehave(changed(output_ids=[63] * 4))  # of half-updated weights
            broken.fail_next_update()
            await w.trainer.publish(1)
            await broken.until(lambda: len(calls(broken, "/update_weights_from_disk")) == 2)
            await broken.release()  # it is paused: they go on when it is told to
            trained = []
            for step in range(2):
                reply = await w.trainer.lease(step)
                for sample in await w.trainer.payload(reply):
                    trained.append(sample.ids)
                    assert sample.ids == expected(sample.prompt_ids, sample.versions)
                await w.trainer.publish(step + 2)
            await w.until(lambda: len(fleet(w).serving) == 2)
            assert [63] * 4 not in trained
            assert broken.label.partition(".")[2] != label.partition(".")[2], "a new life, a new tag"
            assert not broken._garbage, "the answers were given"
            assert fleet(w).engines[engines[1].url].quarantines == 0

    run_async(scenario())


def test_failed_engine_leaves_the_router_before_it_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        router = FakeRouter()
        engines = [FakeEngine(VOCAB), FakeEngine(VOCAB)]
        broken = engines[0]
        note = broken._note

        async def logged(path: str, body: dict[str, Any]) -> None:
            router.log.append(path)
            await note(path, body)

        async with routed_world(tmp_path, router, engines) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await train(w, 1)
            await w.until(lambda: len(fleet(w).serving) == 2)
            broken._note = logged  # type: ignore[method-assign]
            broken.fail_next_update()
            router.removals.clear()
            router.log.clear()
            await w.trainer.publish(5)
            held = fleet(w).engines[broken.url]
            await w.until(lambda: held.state is EngineState.QUARANTINED)
            await several_removals(router)
            assert held.state is EngineState.QUARANTINED
            router.removals.set()
            await w.until(lambda: len(fleet(w).serving) == 2)
            log = [line for line in router.log if line not in ("/health_generate", "/model_info", "/abort_request")]
            load = ["/pause_generation", "/update_weights_from_disk"]
            out, back = f"removed {broken.url}", f"added {broken.url}"
            assert log[: len(load) + 1] == [*load, out]
            assert log[3:6] == ["/ready", "/continue_generation", "/ready"]
            assert log[6:9] == [*load, "/continue_generation"]
            while back not in router.log:
                await w.client.get("/status")
            assert router.log.index(back) > len(router.log) - 1 - router.log[::-1].index("/continue_generation")

    run_async(scenario())


async def several_removals(router: FakeRouter) -> None:
    """Until the controller has asked again and again: it had time to go on without."""
    asked = router.removals_asked
    async with asyncio.timeout(60.0):
        while router.removals_asked < asked + 3:
            await asyncio.sleep(0)


def test_engine_that_an_earlier_controller_left_in_the_router(tmp_path: Path) -> None:
    """It may hold half of a version and be paused: nobody tells it to go on while requests may reach it."""

    async def scenario() -> None:
        router, engine = FakeRouter(), FakeEngine(VOCAB)
        router.left_behind = await engine.start()
        await engine.kill()
        engine.paused = True
        note = engine._note

        async def logged(path: str, body: dict[str, Any]) -> None:
            router.log.append(path)
            await note(path, body)

        engine._note = logged  # type: ignore[method-assign]
        router.removals.clear()
        async with routed_world(tmp_path, router, [engine]) as w:
            await several_removals(router)
            router.removals.set()
            assert sorted(await train(w, 1, begin=True)) == each(1)
            assert router.log[:3] == [f"removed {engine.url}", "/ready", "/continue_generation"]

    run_async(scenario())


def test_dead_engine_costs_nothing_but_its_requests(tmp_path: Path) -> None:
    async def scenario() -> None:
        router = FakeRouter()
        doomed, other = FakeEngine(VOCAB), FakeEngine(VOCAB)
        doomed.hold(lambda _: 2)
        async with routed_world(tmp_path, router, [doomed, other]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await doomed.until(lambda: len(doomed.running) >= 2)
            await doomed.kill()
            assert sorted(await train(w, 4)) == each(4)
            assert list(router.workers) == [other.url]
            held = fleet(w).engines
            assert not held[doomed.url].serving
            assert (held[other.url].strikes, held[other.url].quarantines, held[other.url].last_error) == (0, 0, "")

    run_async(scenario())


def test_hanging_engine_is_found_while_the_other_answers(tmp_path: Path) -> None:
    """Its requests come back long before their own time is over."""

    async def scenario() -> None:
        router = FakeRouter()
        hanging, other = FakeEngine(VOCAB), FakeEngine(VOCAB)
        hanging.hangs = True
        async with routed_world(tmp_path, router, [hanging, other], rollout__request_timeout_s=600.0, **FAST) as w:
            assert sorted(await train(w, 2, begin=True)) == each(2)
            assert any(url == hanging.url for url, _ in router.sent)
            await w.until(lambda: fleet(w).engines[hanging.url].state is EngineState.EVICTED)
            assert "generates nothing" in fleet(w).engines[hanging.url].last_error
            assert fleet(w).engines[other.url].last_error == ""
            assert list(router.workers) == [other.url]

    run_async(scenario())


def test_engine_that_hangs_without_a_slot_of_its_own_is_found(tmp_path: Path) -> None:
    """One group: its slots are on one engine, the router sends it to the other."""

    async def scenario() -> None:
        hanging, other = FakeEngine(VOCAB), FakeEngine(VOCAB)
        hanging.hangs = True
        router = FakeRouter(lambda urls: hanging.url if hanging.url in urls else urls[0])
        changes = {"batch__groups_per_step": 1, "rollout__max_lag_steps": 0}
        async with routed_world(tmp_path, router, [other, hanging], **changes, **FAST) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert (await w.trainer.lease(0)).ready
            assert router.sent[0][0] == hanging.url
            assert router.sent[-1][0] == other.url
            assert fleet(w).engines[other.url].last_error == ""

    run_async(scenario())


@pytest.mark.parametrize("garbage", [changed(meta__id="x.1."), changed(output_ids=[VOCAB] * 4), lambda _: b"<html>"])
def test_only_the_engine_that_an_answer_names_is_blamed(tmp_path: Path, garbage: Any) -> None:
    async def scenario() -> None:
        router = FakeRouter()
        bad, good = FakeEngine(VOCAB), FakeEngine(VOCAB)
        bad.misbehave(garbage)
        async with routed_world(tmp_path, router, [bad, good], rollout__max_lag_steps=0) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert await train(w, 3) == each(3)
            held, named = fleet(w).engines[bad.url], garbage({"output_ids": [], "meta_info": {}}) != b"<html>"
            assert (f"router {w.config.rollout.router_url}: answer" in held.last_error) == named
            assert fleet(w).engines[good.url].last_error == ""
            await w.until(lambda: held.serving)
            lives = [len({label.partition(".")[2] for label in labels(engine)}) for engine in (bad, good)]
            assert lives == [1 + named, 1], "a full load under a new label for the one that was named alone"

    run_async(scenario())


def test_engine_that_restarted_by_itself_is_found_by_its_first_answer(tmp_path: Path) -> None:
    """Its label is nobody's; every engine is looked at, at once rather than after a quarter of a long time."""

    async def scenario() -> None:
        router, engine = FakeRouter(), FakeEngine(VOCAB)
        engine.hold(lambda _: 1)
        async with routed_world(tmp_path, router, [engine], rollout__engine_timeout_s=4000.0) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 8)
            engine.hold(lambda _: None)
            engine.label = "default"
            await engine.release()
            assert sorted(await train(w, 2)) == each(2)
            assert "reports weight version 'default'" in fleet(w).engines[engine.url].last_error

    run_async(scenario())
