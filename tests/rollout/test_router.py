"""Training requests through a router, which chooses the engine: right versions, right limits, nothing lost."""

import asyncio
import re
from collections import Counter
from pathlib import Path

import pytest
from fake_router import FakeRouter, calls, each, expected, fleet, routed_world, train
from rollout_world import VOCAB, installed, run_async

from asympo_megatron.config import Config
from asympo_megatron.config.validate import validate
from asympo_megatron.errors import ConfigError, ControllerError, EngineError
from asympo_megatron.rollout.bell import Bell
from asympo_megatron.rollout.fleet import Engine, EngineState, Fleet
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.testing.fake_engine import FakeEngine


def test_training_goes_through_the_router_and_evaluations_directly(tmp_path: Path) -> None:
    async def scenario() -> None:
        router = FakeRouter(api_key="sesame")
        engines = [FakeEngine(VOCAB, api_key="sesame") for _ in range(2)]
        changes = {"rollout__engine_api_key": "sesame", "rollout__eval__interval_steps": 2, "rollout__eval__prompts": 3}
        async with routed_world(tmp_path, router, engines, **changes) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert sorted(await train(w, 4)) == each(4)
            asked = Counter(body["rid"] for engine in engines for body in engine.requests)
            routed = Counter(body["rid"] for _, body in router.sent)
            assert set(routed.values()) == {1}
            assert {rid for rid in asked if ".e0000000" not in rid} == routed.keys()
            assert any(".e0000000" in rid for rid in asked), "held-out prompts need a certain version"
            assert {url for url, _ in router.sent} == {engine.url for engine in engines}
            assert router.keys == {engine.url: "sesame" for engine in engines}
            tags = [engine.label.partition(".")[2] for engine in engines]
            assert len(set(tags)) == 2
            assert min(map(len, tags)) == 8, "an answer must name its engine"

    run_async(scenario())


def test_weights_change_under_requests_and_every_token_keeps_its_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        router = FakeRouter()
        engines = [FakeEngine(VOCAB), FakeEngine(VOCAB)]
        for engine in engines:
            engine.hold(lambda _: 2)
        async with routed_world(tmp_path, router, engines, rollout__max_lag_steps=2) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            for engine in engines:
                await engine.until(lambda engine=engine: any(one.held for one in engine.running.values()))  # type: ignore[misc]
            await w.trainer.publish(1)
            await w.until(lambda: [one.weights.step for one in fleet(w).serving] == [1, 1])  # type: ignore[union-attr]
            for engine in engines:
                engine.hold(lambda _: None)
                await engine.release()
            samples = await w.trainer.payload(await w.trainer.lease(0))
            for sample in samples:
                assert [(span.version, span.start, span.end) for span in sample.versions] == [(0, 0, 2), (1, 2, 4)]
                assert sample.ids == expected(sample.prompt_ids, sample.versions)

    run_async(scenario())


def test_slow_request_is_aborted_on_every_engine_and_resumed(tmp_path: Path) -> None:
    async def scenario() -> None:
        router = FakeRouter()
        engines = [FakeEngine(VOCAB), FakeEngine(VOCAB)]
        for engine in engines:
            engine.hold(lambda body: 3 if body["rid"].endswith(".0000.") else None)
        changes = {"rollout__request_timeout_s": 0.5, "rollout__max_lag_steps": 0}
        async with routed_world(tmp_path, router, engines, **changes) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            samples = await w.trainer.payload(await w.trainer.lease(0))
            assert [len(sample.ids) for sample in samples] == [7] * 4
            slow = {body["rid"] for _, body in router.sent if body["rid"].endswith(".0000.")}
            assert len(slow) == 4
            for engine in engines:
                assert slow <= {body["rid"] for body in calls(engine, "/abort_request")}

    run_async(scenario())


def test_as_many_requests_as_all_serving_engines_may_have(tmp_path: Path) -> None:
    async def scenario() -> None:
        first, second = FakeEngine(VOCAB), FakeEngine(VOCAB)
        first.hold(lambda _: 1)
        router = FakeRouter(lambda urls: first.url if first.url in urls else urls[0])
        changes = {"rollout__max_in_flight_per_engine": 2, "rollout__max_lag_steps": 3}
        async with routed_world(tmp_path, router, [first, second], **changes) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await w.until(lambda: len(fleet(w).serving) == 2)
            await first.until(lambda: len(first.running) == 4)
            assert (router.in_flight, fleet(w).in_flight) == (4, 4)
            first.hold(lambda _: None)
            await first.release()
            await train(w, 4)
            assert router.most_in_flight == 4

    run_async(scenario())


def row(step: int, version: int) -> VersionRow:
    return VersionRow(version, step, 1, "", "")


def test_admission_counts_every_engine_that_the_router_may_choose() -> None:
    """One that is about to pause still samples with what it holds, and goes on with what it gets."""
    for routed, steps in ((True, [4, 3, 3, 2, 4]), (False, [4, 4, 4, 4, 4])):
        both = Fleet(8, 4, Bell(), routed=routed)
        for url in ("a", "b"):
            both.engines[url] = Engine(url, None, EngineState.SERVING, row(4, 4))  # type: ignore[arg-type]
        a, found = both.engines["a"], [both.step]
        a.state, a.weights, a.loading = EngineState.SYNCING, row(3, 3), row(4, 4)
        found.append(both.step)
        a.state, a.weights, a.loading = EngineState.SYNCING, row(3, 3), None
        found.append(both.step)
        a.weights, a.loading = row(5, 5), row(2, 6)  # back, after a resume
        found.append(both.step)
        a.state, a.weights = EngineState.QUARANTINED, None
        found.append(both.step)
        assert found == steps


def test_requests_that_a_failed_engine_may_hold_count() -> None:
    async def scenario() -> None:
        both = Fleet(2, 4, Bell(), routed=True)
        for url in ("a", "b"):
            both.engines[url] = Engine(url, None, EngineState.SERVING, row(0, 0))  # type: ignore[arg-type]
        slots = [await both.acquire(group) for group in (0, 1, 2, 3)]
        assert sorted(engine.url for engine in slots) == ["a", "a", "b", "b"]
        both.set_state(both.engines["a"], EngineState.QUARANTINED)
        fifth = asyncio.create_task(both.acquire(4))
        for engine in sorted(slots, key=lambda engine: engine.url, reverse=True)[:3]:
            await asyncio.sleep(0)
            assert not fifth.done(), "an engine that serves may have two"
            both.release(engine)
        assert (await fifth).url == "b"
        assert both.in_flight == 2

    run_async(scenario())


def test_tags_name_engines_that_are_trusted_and_no_others() -> None:
    one = Engine("a", None, tag="t")  # type: ignore[arg-type]
    both = Fleet(2, 4, Bell(), routed=True)
    both.engines["a"] = one
    for state in EngineState:
        one.state, one.failure = state, None
        trusted = state in (EngineState.SERVING, EngineState.SYNCING)
        assert both.named("t") is (one if trusted else None)
        assert both.named("") is both.named("u") is None
        one.failure = EngineError("gone")
        assert both.named("t") is None


def test_router_that_was_started_again_gets_its_workers_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        router = FakeRouter()
        async with routed_world(tmp_path, router, rollout__max_lag_steps=0) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert (await w.trainer.lease(0)).ready
            await router.stop()
            await w.trainer.publish(1)
            await w.until(lambda: len(fleet(w).serving) == 2)
            await router.start()
            assert (await w.trainer.lease(1)).ready
            assert {one.last_error for one in fleet(w).engines.values()} == {""}, "nobody is blamed"

    run_async(scenario())


def test_foreign_workers_are_removed(tmp_path: Path) -> None:
    """An engine that an earlier controller left there, or one of another run."""

    async def scenario() -> None:
        router = FakeRouter()
        async with routed_world(tmp_path, router) as w:
            router.workers["http://127.0.0.1:9"] = "stranger"
            assert sorted(await train(w, 2, begin=True)) == each(2)
            assert sorted(router.workers) == sorted(engine.url for engine in w.engines)

    run_async(scenario())


def test_router_that_removes_nobody_ends_the_run(tmp_path: Path) -> None:
    """It would go on sending requests to an engine that has failed."""

    async def scenario() -> None:
        router = FakeRouter()
        short = {"rollout__engine_start_timeout_s": 1.0, "rollout__engine_timeout_s": 1.0}
        async with routed_world(tmp_path, router, **short) as w:
            await train(w, 1, begin=True)
            await w.until(lambda: installed(w, 1))
            router.removing = 500
            await w.engines[0].restart()
            await w.until(lambda: w.controller.failure is not None)
            assert re.match(r"no use of the router for 1 s.*DELETE /workers/.* HTTP 500", str(w.controller.failure))

    run_async(scenario())


def test_failures_of_the_router_are_tried_again_and_blame_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        router = FakeRouter()
        router.refusals = [500, 503, 400, 502]
        async with routed_world(tmp_path, router, rollout__max_lag_steps=0) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert await train(w, 2) == each(2)
            assert {one.last_error for one in fleet(w).engines.values()} == {""}

    run_async(scenario())


def test_request_that_is_refused_twice_ends_the_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        router = FakeRouter()
        router.refusals = [400] * 100
        async with routed_world(tmp_path, router) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            with pytest.raises(ControllerError, match=r"router http://.* refused a request.*engine's context length"):
                await w.trainer.lease(0)

    run_async(scenario())


def test_router_that_never_answers_a_request_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asympo_megatron.rollout.requester._MAX_FAILURES", 3)

    async def scenario() -> None:
        router = FakeRouter()
        router.refusals = [500] * 1000
        async with routed_world(tmp_path, router) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            with pytest.raises(ControllerError, match=r"failed 3 times in a row behind rollout\.router_url.*HTTP 500"):
                await w.trainer.lease(0)

    run_async(scenario())


@pytest.mark.parametrize("key", [None, "wrong"])
def test_router_out_of_reach_or_without_workers(tmp_path: Path, key: str | None) -> None:
    async def scenario() -> None:
        router = FakeRouter(api_key="sesame" if key else None)
        url = await router.start()
        await router.stop()
        changes = {"rollout__router_url": "http://127.0.0.1:9"} if key is None else {"rollout__engine_api_key": key}
        async with routed_world(tmp_path, router, rollout__engine_start_timeout_s=0.3, **changes) as w:
            message = r"no use of the router for 0\.3 s .*engine_start_timeout_s.*/workers failed.*router_url=null"
            if key is not None:
                message = rf"router {url}: /workers answered HTTP 401.*accepts rollout\.engine_api_key"
            with pytest.raises(ControllerError, match=message):
                await train(w, 1, begin=True)

    run_async(scenario())


@pytest.mark.parametrize("status", [202, 403])
def test_router_that_takes_no_engine_in(tmp_path: Path, status: int) -> None:
    """It cannot reach them (it says 202 and tries), or does not want to."""

    async def scenario() -> None:
        router = FakeRouter()
        router.adding = status
        async with routed_world(tmp_path, router, [FakeEngine(VOCAB)], rollout__engine_start_timeout_s=0.5) as w:
            url = w.engines[0].url
            message = f"has none of {url}" + (rf" .*POST /workers of {url} answered HTTP 403" if status == 403 else "")
            with pytest.raises(ControllerError, match=message + ".*Start it where it reaches the engines"):
                await train(w, 1, begin=True)

    run_async(scenario())


def test_in_place_needs_keys_that_a_router_cannot_keep() -> None:
    config = Config()
    config.model.path = "m"
    config.rollout.router_url = "http://127.0.0.1:30000"
    with pytest.raises(ConfigError, match=r"router_url with sync\.pause_mode=in_place.*Set sync\.pause_mode=retract"):
        validate(config)
    for mode in ("retract", "abort"):
        config.sync.pause_mode = mode
        validate(config)
    config.rollout.router_url = "127.0.0.1:30000"
    with pytest.raises(ConfigError, match=r"rollout\.router_url is '127\.0\.0\.1:30000'; it is http://HOST:PORT"):
        validate(config)
