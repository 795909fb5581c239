"""Weights reach engines while requests run: spans, failures, joining engines, going back."""

from pathlib import Path

from rollout_world import VOCAB, installed, labels, run_async, small_config, updates, world

from asympo_megatron import protocol
from asympo_megatron.testing.fake_engine import FakeEngine


def test_update_in_flight_gives_responses_of_two_versions(tmp_path: Path) -> None:
    """Requests go on through an in-place update; spans, lag and cache keys tell the truth."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 2 if body["rid"].split(".")[2] in ("000000002", "000000003") else None)
        async with world(tmp_path, small_config(rollout__max_lag_steps=1), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert (await w.trainer.lease(0)).ready
            await engine.until(lambda: len(engine.running) == 4)
            await w.trainer.publish(1)
            await w.until(lambda: installed(w, 1))
            await engine.release()
            reply = await w.trainer.lease(1)
            samples = await w.trainer.payload(reply)
            spans = [[(s.version, s.start, s.end) for s in sample.versions] for sample in samples]
            assert spans == [[(0, 0, 2), (1, 2, 4)]] * 4
            assert [row.lag for row in reply.responses] == [1] * 4, "the oldest version counts, not the newest"
            assert reply.metrics["rollout/spanning_fraction"] == 1.0
            keys = {body["rid"].split(".")[2]: body["extra_key"] for body in engine.requests}
            assert keys["000000002"] == "0"
            assert keys["000000004"] == "1", "a request started after the update must not see the old prompt cache"
            sync = [(path, body) for path, body in engine.calls if path.startswith(("/pause", "/update", "/cont"))]
            assert [path for path, _ in sync[-3:]] == [
                "/pause_generation", "/update_weights_from_disk", "/continue_generation",
            ]  # fmt: skip
            assert sync[-3][1] == {"mode": "in_place"}
            load = {
                "model_path": w.trainer.path(1),
                "weight_version": labels(engine)[1],
                "flush_cache": False,
                "load_format": "auto",
            }
            assert sync[-2][1] == load

    run_async(scenario())


def test_abort_mode_resumes_from_the_tokens_so_far(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(
            lambda body: 2 if body["sampling_params"]["max_new_tokens"] == 8 and body["extra_key"] == "0" else None
        )
        async with world(tmp_path, small_config(sync__pause_mode="abort", rollout__max_lag_steps=0), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 4)
            await w.trainer.publish(0, "the same step, other weights")
            reply = await w.trainer.lease(0)
            for row, sample in zip(reply.responses, await w.trainer.payload(reply), strict=True):
                assert [(s.version, s.start, s.end) for s in sample.versions] == [(0, 0, 2), (1, 2, 6)]
                again = [body for body in engine.requests if body["input_ids"] == sample.prompt_ids + sample.ids[:2]]
                assert len(again) >= 1
                assert again[0]["sampling_params"]["max_new_tokens"] == 6
                assert again[0]["extra_key"] == "1"
                assert row.response_tokens == 6
            assert [body for path, body in engine.calls if path == "/update_weights_from_disk"][-1]["flush_cache"]

    run_async(scenario())


def test_newest_version_wins(tmp_path: Path) -> None:
    """Versions published while an engine loads are skipped but the last; all that may be loaded are in use."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        async with world(tmp_path, engines=[engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await w.until(lambda: installed(w, 0))
            gate = engine.hold_updates()
            await w.trainer.publish(1)
            await engine.until(lambda: "1" in updates(engine))
            await w.trainer.publish(2)
            ask = protocol.VersionRequest(w.trainer.incarnation, 3, "weights-3")
            version = (await w.trainer.call("/version", ask, protocol.VersionReply)).version
            publish = protocol.PublishRequest(w.trainer.incarnation, 3, version, "weights-3", w.trainer.path(3))
            reply = await w.trainer.call("/publish", publish, protocol.PublishReply)
            assert reply.in_use == [1, 3]
            gate.set()
            await w.until(lambda: installed(w, 3))
            assert updates(engine) == ["0", "1", "3"]

    run_async(scenario())


def test_failed_update_quarantines_and_recovers(tmp_path: Path) -> None:
    """The other engine takes the work meanwhile; the failed one comes back through a full, flushed load."""

    async def scenario() -> None:
        good, bad = FakeEngine(VOCAB), FakeEngine(VOCAB)
        async with world(tmp_path, engines=[good, bad]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await w.until(lambda: len(w.controller.parts.fleet.serving) == 2)
            bad.fail_next_update("no space for weights")
            gate = bad.hold_updates()
            await w.trainer.publish(1)
            for step in range(2):
                assert (await w.trainer.lease(step)).ready, "one engine never delays the others"
            broken = w.controller.parts.fleet.engines[bad.url]
            gate.set()
            await w.until(lambda: broken.serving and broken.weights is not None and broken.weights.version == 1)
            assert "no space for weights" in broken.last_error
            assert updates(bad) == ["0", "1", "1"]
            last = [body for path, body in bad.calls if path in ("/pause_generation", "/update_weights_from_disk")][-2:]
            assert last[0] == {"mode": "abort"}
            assert last[1]["flush_cache"] is True
            aborts = [body["rid"] for path, body in bad.calls if path == "/abort_request"]
            assert set(aborts) == {"world."}, "only requests of this run, never all"

    run_async(scenario())


def test_engine_that_joins_late_gets_weights_before_prompts(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, small_config(run__steps=40)) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert (await w.trainer.lease(0)).ready
            late = FakeEngine(VOCAB)
            await late.start()
            w.engines.append(late)
            gate = late.hold_updates()
            async with w.client.post("/engines", json={"url": late.url + "/"}) as answer:
                assert answer.status == 200
            await late.until(lambda: updates(late) == ["0"])
            assert (await w.trainer.lease(1)).ready
            assert late.requests == []
            gate.set()
            await w.until(lambda: len(w.controller.parts.fleet.serving) == 2)
            w.engines[0].hold(lambda _: 2)  # what comes next goes to the other
            await w.trainer.publish(1)
            await late.until(lambda: late.requests != [])
            assert all(body["extra_key"] != "default" for body in late.requests)

    run_async(scenario())


def test_going_back_recalls_requests_beyond_the_bound(tmp_path: Path) -> None:
    """A trainer resumes two steps earlier while requests of a later batch run. Weights of the earlier step must not
    sample them (they would be trained above the bound): they wait, keep their tokens, and go on later."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 2 if body["extra_key"] == "2" else None)
        config = small_config(rollout__max_lag_steps=0, sync__pause_mode="in_place")
        async with world(tmp_path, config, [engine]) as w:
            await w.trainer.attach()
            for step in range(2):
                await w.trainer.publish(step)
                assert (await w.trainer.lease(step)).ready
            await w.trainer.publish(2)
            await engine.until(lambda: len(engine.running) == 4)  # the batch of step 2, two tokens each
            await w.trainer.attach(0)
            await w.trainer.publish(0)
            await w.until(lambda: installed(w, 3))
            assert engine.running == {}
            for step in range(2):
                assert (await w.trainer.lease(step)).ready
                assert not any(body["extra_key"] == str(3 + step) for body in engine.requests)
                await w.trainer.publish(step + 1)
            reply = await w.trainer.lease(2)
            spans = [[(s.version, s.start, s.end) for s in x.versions] for x in await w.trainer.payload(reply)]
            assert spans == [[(2, 0, 2), (5, 2, 6)]] * 4
            assert [row.lag for row in reply.responses] == [0] * 4

    run_async(scenario())
