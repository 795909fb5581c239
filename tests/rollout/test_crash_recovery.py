"""Controller and trainer die at random points; what the trainer sees is one history without gaps or doubles."""

import random
import shutil
from pathlib import Path

import pytest
from rollout_world import VOCAB, FakePrompt, FakeScorer, Trainer, World, run_async, small_config, world

from asympo_megatron import protocol
from asympo_megatron.config import Config
from asympo_megatron.errors import JournalError, StaleIncarnationError
from asympo_megatron.rollout import describe_journal
from asympo_megatron.testing.fake_engine import FakeEngine

Told = dict[int, tuple[list[protocol.LeasedResponse], list[protocol.Sample]]]


class RandomRun:
    """A trainer that dies and resumes, on controllers that die and are replaced.

    ``told`` is what was handed out for each step; a step that is done again must be told the same.
    """

    def __init__(self, config: Config, home: Path, seed: int) -> None:
        self.config, self.home, self.rng = config, home, random.Random(seed)
        self.told: Told = {}
        self.step = self.checkpoint = self.incarnation = self.lives = 0

    async def live(self, engine: FakeEngine, scorer: FakeScorer) -> None:
        """One life of the controller; leaves what the disk holds when it dies."""
        place = self.home / str(self.lives)
        async with world(place, self.config, [engine], scorer=scorer) as w:
            w.trainer.incarnation = self.incarnation
            if self.incarnation == 0:
                await self._attach(w.trainer)
            for _ in range(self.rng.randint(2, 8)):
                if self.step == self.config.run.steps:
                    break
                await self._event(w.trainer)
            self.lives += 1
            after = self.home / str(self.lives)
            after.mkdir()
            for name in ("journal.sqlite", "journal.sqlite-wal"):
                shutil.copy(place / name, after / name)

    async def _attach(self, trainer: Trainer) -> None:
        self.incarnation = await trainer.attach(self.checkpoint)
        self.step = self.checkpoint
        await trainer.publish(self.step)

    async def _event(self, trainer: Trainer) -> None:
        if self.rng.random() < 0.2:
            await self._attach(trainer)
            return
        reply = await trainer.lease(self.step)
        assert reply.ready
        told = (reply.responses, await trainer.payload(reply))
        assert self.told.setdefault(self.step, told) == told
        if self.rng.random() < 0.2:
            return  # the trainer asks again
        self.step += 1
        await trainer.publish(self.step, f"weights-{self.step}")
        if self.rng.random() < 0.4:
            self.checkpoint = self.step
            await trainer.commit(self.step, self.checkpoint)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("policy", ["admission", "strict", "drop"])
def test_one_history_whatever_dies(tmp_path: Path, seed: int, policy: str) -> None:
    rng = random.Random(seed)
    lag = rng.randint(0, 2)
    config = small_config(run__steps=8, rollout__max_lag_steps=lag, rollout__lag_policy=policy)
    run = RandomRun(config, tmp_path, seed)
    scorer = FakeScorer()
    scorer.failing = lambda prompt: prompt.index % 5 == 3

    async def scenario() -> World:
        while run.step < config.run.steps:
            # Requests of the controller before are still on the engine, at another token each.
            engine = FakeEngine(VOCAB, length=lambda body: 1 + sum(body["input_ids"]) % 8)
            await run.live(engine, scorer)
        async with world(tmp_path / str(run.lives), config, []) as w:
            check(w)
            return w

    def check(w: World) -> None:
        trained = [row.group_id for responses, _ in run.told.values() for row in responses if row.row == 0]
        assert len(trained) == len(set(trained)) == 16
        groups = w.groups
        assert sorted([*trained, *groups.dropped]) == list(range(groups.next_id)), "a prompt is lost or trained twice"
        failing = [k for k in range(groups.next_id) if k % 5 == 3]
        assert set(failing) <= set(groups.dropped)
        if policy != "drop":
            assert failing == groups.dropped
        lags = [row.lag for responses, _ in run.told.values() for row in responses]
        assert max(lags) <= lag or policy == "admission"
        if lag == 0:
            assert trained == sorted(trained)
            assert set(lags) == {0}

    run_async(scenario())


def test_requests_of_the_dead_controller_are_ended(tmp_path: Path) -> None:
    """The new controller aborts by the run's prefix before it loads weights and samples the same groups again."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)
        engine.hold(lambda _: 1)
        async with world(tmp_path / "a", engines=[engine]) as first:
            await first.trainer.attach()
            await first.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 8)
            (tmp_path / "b").mkdir()
            for name in ("journal.sqlite", "journal.sqlite-wal"):
                shutil.copy(tmp_path / "a" / name, tmp_path / "b" / name)
            old = set(engine.running)
            engine.hold(lambda _: None)
            started = engine.start

            async def already() -> str:
                return engine.url

            engine.start = already  # type: ignore[method-assign]
            async with world(tmp_path / "b", engines=[engine]) as second:
                engine.start = started  # type: ignore[method-assign]
                second.trainer.incarnation = 1
                reply = await second.trainer.lease(0)
                assert sorted({row.group_id for row in reply.responses}) == [0, 1]
                assert ("/abort_request", {"rid": "world."}) in engine.calls
                assert not old & set(engine.running)

    run_async(scenario())


def test_trainer_that_wakes_after_its_replacement(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            old = w.trainer
            await old.attach()
            await old.publish(0)
            await old.lease(0)
            new = Trainer(w.client, w.config, old.root)
            await new.attach()
            with pytest.raises(StaleIncarnationError):
                await old.publish(1)
            with pytest.raises(StaleIncarnationError):
                await old.commit(1)
            assert w.controller.parts.journal.committed_step == 0
            assert (await new.lease(0)).ready

    run_async(scenario())


def test_dropped_prompt_is_replaced_and_counted(tmp_path: Path) -> None:
    """A reward that fails for good is never 0: its group is dropped with the reason, and its slot returns, without
    which a run with max_lag_steps 0 would wait for ever."""

    async def scenario() -> None:
        scorer = FakeScorer()
        scorer.failing = lambda prompt: prompt.index in (1, 2, 3)
        config = small_config(rollout__max_lag_steps=0)
        async with world(tmp_path, config, scorer=scorer) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            reply = await w.trainer.lease(0)
            assert sorted({row.group_id for row in reply.responses}) == [0, 4]
            assert reply.metrics["rollout/dropped"] == 3
            rows = {row.group_id: row.reason for row in w.controller.parts.journal.rows()}
            assert rows[1] == "reward of prompt 1 failed: scorer of prompt 1 broke."
            assert rows[0] is None
            assert scorer.calls == 2 + 3 * 3, "three tries each"

    run_async(scenario())


def test_dropping_everything_is_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        scorer = FakeScorer()
        scorer.failing = lambda _: True
        async with world(tmp_path, scorer=scorer) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            with pytest.raises(Exception, match="16 groups in a row were dropped, the last because: reward of prompt"):
                await w.trainer.lease(0)

    run_async(scenario())


def test_overlong_prompts_are_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, small_config(rollout__max_lag_steps=0)) as w:
            usual = w.task.train_prompt
            w.task.train_prompt = lambda index: FakePrompt(index, [3] * (17 if index == 0 else 4))  # type: ignore
            await w.trainer.attach()
            await w.trainer.publish(0)
            reply = await w.trainer.lease(0)
            assert sorted({row.group_id for row in reply.responses}) == [1, 2]
            assert next(w.controller.parts.journal.rows()).reason == "prompt 0 has 17 tokens, max_prompt_tokens is 16"
            assert usual(0).index == 0

    run_async(scenario())


def test_journal_on_a_local_disk(tmp_path: Path) -> None:
    """rollout.journal_dir: nothing of SQLite lies in the shared run directory, and a second run may not share it."""
    shared, local = tmp_path / "shared", tmp_path / "local"

    async def scenario() -> None:
        config = small_config(rollout__journal_dir=str(local))
        async with world(shared, config) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            first = await w.trainer.lease(0)
        async with world(shared, config) as w:
            w.trainer.incarnation = 1
            assert (await w.trainer.lease(0)).responses == first.responses
        assert [path.name for path in shared.iterdir()] == ["weights"]
        assert "leases: 1" in describe_journal(local)
        config.run.name = "another"
        with pytest.raises(JournalError, match=r"has run_id 'world'.*rollout\.journal_dir, where it is set, to a new"):
            async with world(shared, config):
                pass

    run_async(scenario())
