"""Evaluation: held-out prompts at exactly one weight version, while training goes on around it."""

import asyncio
from pathlib import Path

from evaluation_world import eval_config, held_out, to_the_end
from rollout_world import VOCAB, run_async, updates, world

from asympo_megatron import protocol
from asympo_megatron.testing.fake_engine import FakeEngine


def test_every_interval_first_and_last(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        config = eval_config(
            rollout__eval__samples_per_prompt=2, rollout__eval__temperature=0.25, rollout__eval__top_p=0.9
        )
        async with world(tmp_path, config, [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            found = [result for carried in (await to_the_end(w)).values() for result in carried]
            assert [(result.step, result.version) for result in found] == [(0, 0), (2, 2), (4, 4), (5, 5)]
            assert {(result.accuracy, result.responses, result.mean_tokens) for result in found} == {(0.5, 6, 4.0)}
            asked = [body for body in engine.requests if held_out(body)]
            assert len(asked) == 24
            assert {(b["sampling_params"]["temperature"], b["sampling_params"]["top_p"]) for b in asked} == {
                (0.25, 0.9)
            }
            assert {body["extra_key"] for body in asked} == {"0", "2", "4", "5"}
            trained = [body for body in engine.requests if not held_out(body)]
            assert len(trained) == 5 * 4, "evaluation takes no slot of the lag budget"
            requester = w.controller.parts.requester
            assert requester is not None
            assert requester.tokens_sampled == 5 * 4 * 4, "rollout/tokens_per_s counts training tokens alone"

    run_async(scenario())


def test_greedy_answers_are_asked_for_and_counted_apart(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        config = eval_config(rollout__eval__greedy=True, rollout__eval__samples_per_prompt=3)
        async with world(tmp_path, config, [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            found = [result for carried in (await to_the_end(w)).values() for result in carried]
            # of rows 0 to 3 of a prompt this world's scorer likes 1 and 3; row 3 is the greedy one
            assert {(r.accuracy, r.greedy_accuracy, r.responses) for r in found} == {(1 / 3, 1.0, 9)}
            asked = [b["sampling_params"] for b in engine.requests if held_out(b) and b["extra_key"] == "0"]
            assert sorted(params["temperature"] for params in asked) == [0.0] * 3 + [1.0] * 9

    run_async(scenario())


def test_weights_wait_for_the_evaluation_and_training_does_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 2 if held_out(body) else None)
        async with world(tmp_path, eval_config(), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 3)
            assert (await w.trainer.lease(0)).ready
            await w.trainer.publish(1)
            assert (await w.trainer.lease(1)).ready, "training requests go on beside an evaluation"
            await w.trainer.publish(2)
            assert engine.version == "0"
            publish = protocol.PublishRequest(1, 2, 2, "weights-2", w.trainer.path(2))
            assert (await w.trainer.call("/publish", publish, protocol.PublishReply)).in_use == [0, 2]
            engine.hold(lambda _: None)
            await engine.release()
            carried = await to_the_end(w, first=2)
            found = [result.version for results in carried.values() for result in results]
            assert found == [0, 2, 4, 5], "a version to be evaluated is never skipped"
            assert updates(engine)[:2] == ["0", "2"], "version 1 became old while the evaluation ran"

    run_async(scenario())


def test_answers_with_other_weights_are_sampled_again(tmp_path: Path) -> None:
    """An engine loses its weights under a running evaluation: only answers of the pinned version count."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 2 if held_out(body) else None)
        async with world(tmp_path, eval_config(rollout__max_lag_steps=0), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 3)
            first = set(engine.running)
            w.controller.parts.ledger.versions[77] = w.controller.parts.ledger.versions[0]
            engine.label = "77"  # known, but not the pinned one: the answers mix versions 0 and 77
            await engine.release()
            await engine.until(lambda: len(engine.running) == 3 and not first & set(engine.running))
            engine.label = "0"
            engine.hold(lambda _: None)
            await engine.release()
            await w.until(lambda: w.controller.parts.targets.pinned is None)
            await w.until(lambda: w.controller.parts.journal.has_evaluation(0, "weights-0"))
            result = (await w.trainer.lease(0)).evaluations[0]
            assert (result.version, result.responses) == (0, 3)
            assert len([body for body in engine.requests if held_out(body)]) >= 6

    run_async(scenario())


def test_evaluation_survives_its_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 2 if held_out(body) else None)
        async with world(tmp_path, eval_config(), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 3)
            await w.trainer.publish(1)
            engine.hold(lambda _: None)
            await engine.restart()
            await w.until(lambda: w.controller.parts.targets.pinned is None)
            assert updates(engine)[:2] == ["0", "0"], "the engine comes back with the pinned version"
            assert [e.version for e in (await w.trainer.lease(0)).evaluations] == [0]

    run_async(scenario())


def test_repeated_lease_carries_the_same_evaluations(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, eval_config()) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await w.until(lambda: w.controller.parts.journal.has_evaluation(0, "weights-0"))
            first = await w.trainer.lease(0)
            assert len(first.evaluations) == 1
            assert (await w.trainer.lease(0)).evaluations == first.evaluations, "the first reply may have been lost"
            assert (await w.trainer.lease(1)).evaluations == []

    run_async(scenario())


def test_unscored_answers_are_left_out_not_counted_as_wrong(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, eval_config(rollout__eval__samples_per_prompt=2)) as w:
            w.scorer.failing = lambda prompt: len(prompt.ids) == 2 and prompt.index == 1
            await w.trainer.attach()
            await w.trainer.publish(0)
            await w.until(lambda: w.controller.parts.targets.pinned is None and w.groups.next_id > 0)
            result = (await w.trainer.lease(0)).evaluations[0]
            assert (result.accuracy, result.responses) == (0.5, 4)

    run_async(scenario())


def test_finish_waits_for_the_last_evaluation(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 2 if held_out(body) and body["extra_key"] == "5" else None)
        async with world(tmp_path, eval_config(), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            for step in range(5):
                assert (await w.trainer.lease(step)).ready
                await w.trainer.publish(step + 1)
            early = await w.trainer.call("/finish", protocol.FinishRequest(1, 5, 0.01), protocol.FinishReply)
            assert not early.done
            finish = asyncio.create_task(w.trainer.finish(5))
            await engine.until(lambda: len(engine.running) == 3)
            await engine.release()
            assert [e.step for e in (await finish).evaluations][-1] == 5

    run_async(scenario())
