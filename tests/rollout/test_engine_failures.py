"""Engines that die, hang, lie or never start: their work goes elsewhere, and nothing is lost or trained twice."""

from pathlib import Path
from typing import Any

import pytest
from rollout_world import VOCAB, FakePrompt, FakeTask, World, changed, run_async, small_config, world

from asympo_megatron.errors import ControllerError
from asympo_megatron.rollout.build import serve_controller
from asympo_megatron.rollout.fleet import EngineState
from asympo_megatron.testing.fake_engine import FakeEngine


def _shorter(answer: dict[str, Any]) -> dict[str, Any]:
    answer["meta_info"]["weight_versions"][-1]["end"] -= 1
    return answer


GARBAGE = {
    "id outside the vocabulary": (changed(output_ids=[1, 2, VOCAB, 3]), "token id outside the vocabulary of 64"),
    "negative id": (changed(output_ids=[1, 2, -1, 3]), "token id outside the vocabulary"),
    "too many tokens": (changed(output_ids=[1] * 9), "answer has 9 tokens, asked were at most 8"),
    "no token": (changed(output_ids=[], meta__weight_versions=[]), "no token although it finished by stop"),
    "another request": (changed(meta__id="x.1."), "carries request id 'x.1.'"),
    "ids of another type": (changed(output_ids=[1.5, "2"]), "not of the expected form"),
    "no spans": (changed(meta__weight_versions=None), "no meta_info.weight_versions"),
    "span with a gap": (
        changed(meta__weight_versions=[{"version": "0", "start": 1, "end": 4}]),
        "gap or an overlap at token 1, expected 0",
    ),
    "spans too short": (_shorter, "covers 3 of 4 tokens"),
    "restarted": (
        changed(meta__weight_versions=[{"version": "default", "start": 0, "end": 4}]),
        "'default' was never published by this run",
    ),
    "unknown version": (
        changed(meta__weight_versions=[{"version": "9", "start": 0, "end": 4}]),
        "'9' was never published",
    ),
    "other label": (
        changed(meta__weight_versions=[{"version": "0.ab", "start": 0, "end": 4}]),
        "'0.ab' was never published",
    ),
    "labels of another controller": (
        changed(meta__weight_version="0.ab", meta__weight_versions=[{"version": "0.ab", "start": 0, "end": 4}]),
        "weights labelled by another controller",
    ),
    "unknown finish": (changed(meta__finish_reason={"type": "tired"}), "finish_reason is 'tired'"),
    "not JSON": (lambda _: b"<html>", "not of the expected form"),
    "server error": (lambda _: 503, "answered HTTP 503"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_quarantines_the_engine_and_is_never_trained(tmp_path: Path, name: str) -> None:
    how, message = GARBAGE[name]

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.misbehave(how)
        async with world(tmp_path, engines=[engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            reply = await w.trainer.lease(0)
            samples = await w.trainer.payload(reply)
            assert [len(sample.ids) for sample in samples] == [4] * 4
            assert all(0 <= token < VOCAB for sample in samples for token in sample.ids)
            held = w.controller.parts.fleet.engines[engine.url]
            assert message in held.last_error
            assert engine.url in held.last_error
            assert [path for path, _ in engine.calls].count("/update_weights_from_disk") == 2, "a full load again"

    run_async(scenario())


def test_engine_dies_in_the_middle(tmp_path: Path) -> None:
    """Every request of the dead engine goes to the other one; the groups are complete and each is trained once."""

    async def scenario() -> None:
        doomed, other = FakeEngine(VOCAB), FakeEngine(VOCAB)
        doomed.hold(lambda _: 2)
        async with world(tmp_path, small_config(run__steps=4), [doomed, other]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await doomed.until(lambda: len(doomed.running) >= 2)
            await doomed.kill()
            trained = []
            for step in range(4):
                reply = await w.trainer.lease(step)
                trained += [(row.group_id, row.row) for row in reply.responses]
                await w.trainer.publish(step + 1)
            assert sorted(trained) == [(group, row) for group in range(8) for row in range(2)]
            assert w.controller.parts.fleet.engines[doomed.url].state is not EngineState.SERVING

    run_async(scenario())


def test_restarted_engine_joins_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda _: 1)
        async with world(tmp_path, engines=[engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 8)
            engine.hold(lambda _: None)
            await engine.restart()
            for sample in await w.trainer.payload(await w.trainer.lease(0)):
                assert [(span.version, span.start, span.end) for span in sample.versions] == [(0, 0, 4)]
            assert engine.version == "0"

    run_async(scenario())


@pytest.mark.parametrize("label", ["default", "0.ab12cd34"])
def test_other_weights_are_found_by_the_health_check(tmp_path: Path, label: str) -> None:
    """Nothing is in flight, the engine restarted or got another run's version 0: the next look at /model_info finds
    out."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        config = small_config(rollout__max_lag_steps=0, rollout__engine_timeout_s=1.0)
        async with world(tmp_path, config, engines=[engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert (await w.trainer.lease(0)).ready
            engine.label = label
            held = w.controller.parts.fleet.engines[engine.url]
            await w.until(lambda: f"reports weight version {label!r}" in held.last_error and held.serving)
            assert engine.version == "0"

    run_async(scenario())


def test_lost_connection_alone_is_no_failure(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.misbehave(lambda _: None)
        async with world(tmp_path, engines=[engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            for step in range(2):
                assert (await w.trainer.lease(step)).ready
            assert [path for path, _ in engine.calls].count("/update_weights_from_disk") == 1, "not quarantined"
            attempts = sorted(body["rid"] for body in engine.requests)
            assert len(attempts) == len(set(attempts)), "a request id is never used twice"
            assert sum(rid.endswith(".0001.") for rid in attempts) == 1
            aborted = [body["rid"] for path, body in engine.calls if path == "/abort_request"]
            assert len([rid for rid in aborted if rid.endswith(".0000.")]) == 1, "the engine may still be at work on it"

    run_async(scenario())


def test_prompt_outside_the_vocabulary_is_never_sent(tmp_path: Path) -> None:
    class WideTask(FakeTask):
        def train_prompt(self, index: int) -> FakePrompt:
            return FakePrompt(index, [3, VOCAB, 5])

    async def scenario() -> None:
        async with world(tmp_path, task=WideTask()) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            with pytest.raises(ControllerError, match="prompt 0 holds token id 64, outside the vocabulary of 64"):
                await w.trainer.lease(0)
            assert w.engines[0].requests == []

    run_async(scenario())


def test_refused_request_ends_the_run_with_the_engines_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.misbehave(lambda _: 400)
        async with world(tmp_path, engines=[engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            with pytest.raises(ControllerError, match=r"refused a request: armed failure.*engine's context length"):
                await w.trainer.lease(0)

    run_async(scenario())


def test_engine_that_never_gets_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.is_ready = False
        config = small_config(rollout__engine_start_timeout_s=0.2, rollout__engine_timeout_s=0.2)
        async with world(tmp_path, config, [engine]) as w:
            await w.trainer.attach()
            with pytest.raises(
                ControllerError, match=r"did not get ready within 0\.2 s .*engine_start_timeout_s"
            ) as dead:
                await w.trainer.lease(0)
            assert "/ready answered HTTP 503" in str(dead.value)

    run_async(scenario())


def test_engine_that_keeps_failing_is_given_up(tmp_path: Path) -> None:
    """The other engine serves on; the bad one is evicted and may be taken in again by hand."""

    async def scenario() -> None:
        good, bad = FakeEngine(VOCAB), FakeEngine(VOCAB)
        for _ in range(5):
            bad.fail_next_update("out of memory")
        async with world(tmp_path, engines=[good, bad]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            held = w.controller.parts.fleet.engines[bad.url]
            await w.until(lambda: held.state is EngineState.EVICTED)
            assert "failed 5 times in a row" in held.last_error
            assert (await w.trainer.lease(0)).ready
            async with w.client.post("/engines", json={"url": bad.url}) as answer:
                assert answer.status == 200
            await w.until(lambda: len(w.controller.parts.fleet.serving) == 2)

    run_async(scenario())


def test_api_key(tmp_path: Path) -> None:
    async def scenario(key: str | None, **deadlines: float) -> World:
        engine = FakeEngine(VOCAB, api_key="open sesame")
        config = small_config(rollout__engine_api_key=key, **deadlines)
        async with world(tmp_path / str(key), config, [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert (await w.trainer.lease(0)).ready
            return w

    run_async(scenario("open sesame"))
    with pytest.raises(ControllerError, match="did not get ready"):
        run_async(scenario(None, rollout__engine_start_timeout_s=0.3, rollout__engine_timeout_s=0.2))


def test_port_in_use_and_second_controller(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        await engine.start()
        config, port = small_config(), int(engine.url.rsplit(":", 1)[1])
        try:
            with pytest.raises(ControllerError, match=rf"cannot listen on 127\.0\.0\.1:{port}.*controller_port"):
                await serve_controller(config, tmp_path, FakeTask(), object(), [], host="127.0.0.1", port=port)  # type: ignore[arg-type]
        finally:
            await engine.kill()

    run_async(scenario())


def test_failed_controller_raises_after_telling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`asympo control` ends with the reason; it waits a moment for a trainer that wants to know."""
    monkeypatch.setattr("asympo_megatron.rollout.build._FAILURE_TOLD_S", 0.05)

    async def scenario() -> None:
        config = small_config(rollout__engine_start_timeout_s=0.1)
        urls: list[str] = []
        with pytest.raises(ControllerError, match=r"no engine is left \(none was named\)"):
            await serve_controller(
                config,
                tmp_path,
                FakeTask(),
                object(),
                [],
                host="127.0.0.1",
                port=0,
                on_ready=urls.append,  # type: ignore[arg-type]
            )
        assert urls[0].startswith("http://127.0.0.1:")

    run_async(scenario())
