"""Evaluations of trainers, engines and controllers that end before they do: each result counts once."""

from pathlib import Path
from typing import Any

import pytest
from evaluation_world import eval_config, held_out, to_the_end
from rollout_world import VOCAB, World, run_async, world

from asympo_megatron.rollout import syncer
from asympo_megatron.rollout.collective import SenderLost
from asympo_megatron.rollout.install import SyncOptions
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.testing.fake_engine import FakeEngine


def test_same_weights_after_a_resume_are_not_evaluated_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        async with world(tmp_path, eval_config(), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            before = await to_the_end(w)
            asked = len([body for body in engine.requests if held_out(body)])
            await w.trainer.attach(0)
            await w.trainer.publish(0)
            after = await to_the_end(w)
            assert [e.step for found in after.values() for e in found] == [0, 2, 4, 5]
            flat = [[e for found in run.values() for e in found] for run in (before, after)]
            assert flat[0] == flat[1]
            assert len([body for body in engine.requests if held_out(body)]) == asked

    run_async(scenario())


def test_evaluation_that_a_dead_trainer_took_is_delivered_again(tmp_path: Path) -> None:
    """The result of step 2 went with lease 3; the trainer dies in step 3 and resumes there with the very weights that
    the engines hold, so that nothing is published again."""

    async def scenario() -> None:
        async with world(tmp_path, eval_config()) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            got = []
            for step in range(4):
                if step == 3:
                    await w.until(lambda: w.controller.parts.journal.has_evaluation(2, "weights-2"))
                got.append([e.step for e in (await w.trainer.lease(step)).evaluations])
                if step < 3:
                    await w.trainer.publish(step + 1)
            await w.trainer.attach(3)
            await w.trainer.publish(3)
            carried = await to_the_end(w, first=3)
            again = [e.step for results in carried.values() for e in results]
            assert sorted([step for taken in got[:3] for step in taken] + again) == [0, 2, 4, 5], "each exactly once"

    run_async(scenario())


def test_evaluation_forgotten_on_a_resume_is_asked_for_again(tmp_path: Path) -> None:
    """Weights 2 wait behind the evaluation of weights 0 when the trainer goes back to step 0. Step 1 publishes nothing
    (sync.interval_steps 2), and the newest version holds weights 2 already: nobody publishes them again."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 2 if held_out(body) else None)
        async with world(tmp_path, eval_config(rollout__max_lag_steps=3), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 3)
            for step in range(2):
                assert (await w.trainer.lease(step)).ready
            await w.trainer.publish(2)
            await w.trainer.attach(1)
            assert (await w.trainer.lease(1)).ready
            assert await w.trainer.publish(2) == 1, "no new version is needed"
            assert await w.trainer.publish(2) == 1, "asking again changes nothing"
            engine.hold(lambda _: None)
            await engine.release()
            carried = await to_the_end(w, first=2)
            assert [e.step for results in carried.values() for e in results] == [0, 2, 4, 5]

    run_async(scenario())


def test_evaluation_owed_by_a_dead_controller(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 2 if held_out(body) else None)
        async with world(tmp_path, eval_config(), [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 3)
        async with world(tmp_path, eval_config(), [FakeEngine(VOCAB)]) as w:
            w.trainer.incarnation = 1
            await w.until(lambda: w.controller.parts.targets.pinned is None)
            assert [e.version for e in (await w.trainer.lease(0)).evaluations] == [0]

    run_async(scenario())


def test_evaluation_of_later_weights_waits_for_their_step(tmp_path: Path) -> None:
    """Weights 2 are evaluated when the trainer dies and resumes at step 0: the row of step 2 is written again later."""

    async def scenario() -> None:
        async with world(tmp_path, eval_config(rollout__max_lag_steps=3)) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            for step in range(2):
                assert (await w.trainer.lease(step)).ready
                await w.trainer.publish(step + 1)
            await w.until(lambda: w.controller.parts.journal.has_evaluation(2, "weights-2"))
            await w.trainer.attach(0)
            await w.trainer.publish(0)
            carried = await to_the_end(w)
            steps = {step: [e.step for e in found] for step, found in carried.items()}
            assert sorted(found for of_step in steps.values() for found in of_step) == [0, 2, 4, 5]
            assert all(found <= step for step, of_step in steps.items() for found in of_step)

    run_async(scenario())


def test_evaluation_owed_by_a_dead_controller_to_a_trainer_that_resumed_with_the_same_weights(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda body: 2 if held_out(body) else None)
        async with world(tmp_path, eval_config(), [engine]) as w:
            for _ in range(2):
                await w.trainer.attach()
                assert await w.trainer.publish(0) == 0, "nothing is published again"
            await engine.until(lambda: len(engine.running) == 3)
        async with world(tmp_path, eval_config(), [FakeEngine(VOCAB)]) as w:
            w.trainer.incarnation = 2
            await w.until(lambda: w.controller.parts.targets.pinned is None)
            assert [e.version for e in (await w.trainer.lease(0)).evaluations] == [0]

    run_async(scenario())


@pytest.fixture
def senders(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Incarnations of trainers that are there to send their weights."""
    alive: set[int] = set()
    load = syncer.install

    async def install(engine: Any, row: VersionRow, options: SyncOptions, *, fresh: bool) -> None:
        if row.incarnation not in alive:
            raise SenderLost("the trainer's sender did not answer")
        await load(engine, VersionRow(row.version, row.step, row.incarnation, "", "/w"), options, fresh=fresh)

    monkeypatch.setattr(syncer, "install", install)
    return alive


async def pinned_in_memory(w: World, engine: FakeEngine, senders: set[int]) -> None:
    """Weights 0 lie in the first trainer's memory, and their evaluation runs."""
    engine.hold(lambda body: 2 if held_out(body) else None)
    w.trainer.path = "collective://127.0.0.1:{}".format
    senders.add(1)
    await w.trainer.attach()
    await w.trainer.publish(0)
    await engine.until(lambda: sum(held_out(body) for body in engine.requests) == 3)


def test_trainer_and_engines_go_together_while_their_weights_are_evaluated(tmp_path: Path, senders: set[int]) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        async with world(tmp_path, eval_config(), [engine]) as w:
            await pinned_in_memory(w, engine, senders)
            held = w.controller.parts.fleet.engines[engine.url]
            await engine.kill()
            senders.clear()
            await w.until(lambda: held.weights is None)
            engine.hold(lambda _: None)
            await w.trainer.attach()
            senders.add(2)
            await w.trainer.publish(0)
            await engine.restart()
            carried = await to_the_end(w)
            assert sorted(e.step for found in carried.values() for e in found) == [0, 2, 4, 5]

    run_async(scenario())


def test_the_last_engine_with_the_weights_of_a_replaced_trainer_goes_while_they_are_evaluated(
    tmp_path: Path, senders: set[int]
) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        async with world(tmp_path, eval_config(), [engine]) as w:
            await pinned_in_memory(w, engine, senders)
            assert (await w.trainer.lease(0)).ready
            senders.clear()
            await w.trainer.attach()
            senders.add(2)
            assert (await w.trainer.lease(0)).ready
            await w.trainer.publish(1)
            assert w.controller.parts.targets.pinned is not None, "the engine has them still"
            engine.hold(lambda _: None)
            await engine.restart()
            carried = await to_the_end(w, first=1)
            assert [e.step for found in carried.values() for e in found] == [2, 4, 5], "nobody has weights 0 any more"

    run_async(scenario())
