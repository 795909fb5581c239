"""Responses of several turns: exact ids, masks and versions; budget and turn limit; environments that fail."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rollout_world import VOCAB, FakePrompt, FakeScorer, FakeTask, run_async, small_config, world

from asympo_megatron.config import Config
from asympo_megatron.errors import ConfigError, EpisodeError
from asympo_megatron.records import VersionSpan
from asympo_megatron.rollout import build_controller, describe_journal
from asympo_megatron.rollout.answer import SamplingParams
from asympo_megatron.rollout.episodes import Player
from asympo_megatron.rollout.requester import Draft, Sampled
from asympo_megatron.testing.fake_engine import FakeEngine

TURN = 3
"""Tokens of a turn of the engines here."""


@dataclass(frozen=True)
class ScriptedReply:
    turn: str
    text: str
    ids: list[int]


@dataclass
class ScriptedEnvironment:
    """Replies [60 + k, 50] to turn k, as often as ``replies`` says."""

    replies: int = 2
    failing: Callable[[FakePrompt, int], bool] = lambda *_: False
    asked: list[tuple[list[int], list[tuple[str, str]]]] = field(default_factory=list)

    async def reply(self, prompt: FakePrompt, turn: list[int], history: list[tuple[str, str]]) -> ScriptedReply | None:
        number = len(history)
        self.asked.append((turn, list(history)))
        if self.failing(prompt, number):
            raise EpisodeError(f"the environment of prompt {prompt.index} broke")
        return ScriptedReply(f"t{number}", f"r{number}", [60 + number, 50]) if number < self.replies else None


def game_config(**changes: Any) -> Config:
    changes = {"rollout__max_lag_steps": 0, "rollout__sampling__max_new_tokens": 24, **changes}
    return small_config(task__environment="scripted:reply", **changes)


def three_turns() -> FakeEngine:
    return FakeEngine(VOCAB, length=lambda _: TURN)


def sampled(context: list[int], version: int = 0, start: int = 0, size: int = TURN) -> list[int]:
    """What a fake engine samples after ``context`` (its own formula)."""
    return [(sum(context) + 7 * k + 13 * version) % VOCAB for k in range(start, size)]


def test_ids_masks_and_requests_of_three_turns_exactly(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine, environment, scorer = three_turns(), ScriptedEnvironment(), FakeScorer()
        async with world(tmp_path, game_config(), [engine], scorer=scorer, environment=environment) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            reply = await w.trainer.lease(0)
            samples = await w.trainer.payload(reply)
            prompt = [0, 3, 5]
            first = sampled(prompt)
            second = sampled([*prompt, *first, 60, 50])
            third = sampled([*prompt, *first, 60, 50, *second, 61, 50])
            assert samples[0].prompt_ids == prompt
            assert samples[0].ids == [*first, 60, 50, *second, 61, 50, *third]
            assert samples[0].mask == [1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
            assert samples[0].versions == [VersionSpan(0, 0, 3), VersionSpan(0, 5, 8), VersionSpan(0, 10, 13)]
            row = reply.responses[0]
            assert (row.response_tokens, row.trained_tokens, row.lag) == (13, 9, 0)
            assert reply.metrics["rollout/turns_mean"] == 3.0
            assert reply.metrics["rollout/out_of_turns_fraction"] == 0.0
            sent = [b for b in engine.requests if b["rid"].startswith("world.000001.000000000.0000.")]
            assert [body["rid"][-6:] for body in sent] == [".0000.", ".0001.", ".0002."]
            assert [body["input_ids"] for body in sent][1] == [*prompt, *first, 60, 50]
            assert [body["sampling_params"]["max_new_tokens"] for body in sent] == [24, 19, 14]
            history = [("t0", "r0"), ("t1", "r1")]
            assert (prompt, [third, third], [history, history]) in scorer.told
            assert (second, history[:1]) in environment.asked
            requester = w.controller.parts.requester
            assert requester is not None
            assert requester.tokens_sampled == 4 * 3 * TURN, "replies are not sampled tokens"

    run_async(scenario())


def test_a_turn_spans_versions_and_the_oldest_gives_the_lag(tmp_path: Path) -> None:
    """Version 1 arrives while every second turn has one token: spans cover exactly what each version sampled."""

    async def scenario() -> None:
        engine = three_turns()
        engine.hold(lambda body: 1 if body["rid"].endswith(".0001.") else None)
        config = game_config(rollout__max_lag_steps=1, batch__groups_per_step=1)
        async with world(tmp_path, config, [engine], environment=ScriptedEnvironment()) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 4)
            await w.trainer.publish(1)
            await w.until(lambda: w.controller.parts.fleet.step == 1)
            engine.hold(lambda _: None)
            await engine.release()
            sample = (await w.trainer.payload(await w.trainer.lease(0)))[0]
            assert sample.versions == [
                VersionSpan(0, 0, 3), VersionSpan(0, 5, 6), VersionSpan(1, 6, 8), VersionSpan(1, 10, 13),
            ]  # fmt: skip
            context = [0, 3, 5, *sample.ids[:5]]
            assert sample.ids[5:8] == [*sampled(context, 0, 0, 1), *sampled(context, 1, 1, 3)]
            assert [row.lag for row in (await w.trainer.lease(1)).responses] == [1, 1]

    run_async(scenario())


def test_a_lost_turn_is_asked_for_again_under_a_new_id(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = three_turns()
        engine.misbehave(lambda _: None, lambda body: body["rid"].endswith(".000000000.0000.0001."))
        async with world(tmp_path, game_config(), [engine], environment=ScriptedEnvironment()) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            samples = await w.trainer.payload(await w.trainer.lease(0))
            assert [len(sample.ids) for sample in samples] == [13] * 4
            assert samples[0].ids == samples[1].ids, "both responses to one prompt, one of them with a lost turn"
            rids = [body["rid"] for body in engine.requests]
            assert len(set(rids)) == len(rids)
            assert sorted(rid[-6:] for rid in rids if ".000000000.0000." in rid) == [f".{k:04d}." for k in range(4)]

    run_async(scenario())


@pytest.mark.parametrize(
    ("budget", "mask", "asked"),
    [
        (8, [1, 1, 1, 0, 0, 1, 1, 1], [8, 3]),  # the second turn fills it
        (6, [1, 1, 1, 0, 0, 1], [6, 1]),  # the second turn is cut short
        (5, [1, 1, 1], [5]),  # the reply would fit, but not one token after it
        (3, [1, 1, 1], [3]),
    ],
)
def test_turns_and_replies_share_one_budget(tmp_path: Path, budget: int, mask: list[int], asked: list[int]) -> None:
    async def scenario() -> None:
        engine = three_turns()
        config = game_config(rollout__sampling__max_new_tokens=budget)
        async with world(tmp_path, config, [engine], environment=ScriptedEnvironment()) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            reply = await w.trainer.lease(0)
            assert [sample.mask for sample in await w.trainer.payload(reply)] == [mask] * 4
            assert reply.metrics["rollout/truncated_fraction"] == 1.0
            sent = [b for b in engine.requests if ".000000000.0000." in b["rid"]]
            assert [body["sampling_params"]["max_new_tokens"] for body in sent] == asked

    run_async(scenario())


def test_turns_are_limited_and_the_limit_is_reported(tmp_path: Path) -> None:
    """Two turns each: prompts whose environment would go on are out of turns, one that is over by then is not."""

    async def scenario() -> None:
        for replies, share in ((9, 1.0), (1, 0.0)):
            config = game_config(task__max_turns=2, rollout__sampling__overlong="mask")
            async with world(
                tmp_path / str(replies), config, [three_turns()], environment=ScriptedEnvironment(replies)
            ) as w:
                await w.trainer.attach()
                await w.trainer.publish(0)
                reply = await w.trainer.lease(0)
                assert [row.trained_tokens for row in reply.responses] == [2 * TURN] * 4, "not truncated: trained"
                figures = [reply.metrics[f"rollout/{name}"] for name in ("turns_mean", "out_of_turns_fraction")]
                assert figures == [2.0, share]

    run_async(scenario())


def test_an_environment_that_fails_drops_its_group_and_ends_its_requests(tmp_path: Path) -> None:
    """Response 1 of the first group is still being sampled when the environment fails over response 0."""

    async def scenario() -> None:
        engine = three_turns()
        slow = ".000000000.0001.0000."
        engine.hold(lambda body: 1 if body["rid"].endswith(slow) else None)
        environment = ScriptedEnvironment(failing=lambda prompt, turn: prompt.index == 0 and turn == 1)
        async with world(tmp_path, game_config(), [engine], environment=environment) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            reply = await w.trainer.lease(0)
            assert [row.group_id for row in reply.responses] == [1, 1, 2, 2], "another prompt takes the slot"
            assert reply.metrics["rollout/dropped"] == 1
            await engine.until(lambda: any(body.get("rid", "").endswith(slow) for _, body in engine.calls))
        assert "the environment of prompt 0 broke" in describe_journal(tmp_path)

    run_async(scenario())


def test_a_group_whose_controller_died_is_played_again_from_its_first_turn(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = three_turns()
        engine.hold(lambda body: 1 if body["rid"].endswith(".0001.") else None)
        config = game_config(batch__groups_per_step=1)
        async with world(tmp_path, config, [engine], environment=ScriptedEnvironment()) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await engine.until(lambda: len(engine.running) == 2)
        second = three_turns()
        async with world(tmp_path, config, [second], environment=ScriptedEnvironment()) as w:
            w.trainer.incarnation = 1
            reply = await w.trainer.lease(0)
            assert [row.group_id for row in reply.responses] == [0, 0]
            assert [sample.mask.count(0) for sample in await w.trainer.payload(reply)] == [4, 4]
            assert len(second.requests) == 6

    run_async(scenario())


def test_an_evaluation_plays_the_same_game(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine, scorer = three_turns(), FakeScorer()
        environment = ScriptedEnvironment(failing=lambda prompt, _: len(prompt.ids) == 2 and prompt.index == 1)
        config = game_config(rollout__eval__interval_steps=2, rollout__eval__prompts=3)
        async with world(tmp_path, config, [engine], scorer=scorer, environment=environment) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await w.until(lambda: w.controller.parts.journal.has_evaluation(0, "weights-0"))
            result = (await w.trainer.lease(0)).evaluations[0]
            assert (result.responses, result.mean_tokens) == (2, 13.0), "the failed one is left out"
            held_out = [prompt for prompt, _, histories in scorer.told if len(prompt) == 2 and len(histories[0]) == 2]
            assert sorted(held_out) == [[0, 9], [2, 9]]

    run_async(scenario())


class ScriptedRequester:
    """Hands out turns with log-probs, one after the other; a turn takes two requests."""

    def __init__(self, *turns: list[int]) -> None:
        self._turns = list(turns)
        self.drafts: list[Draft] = []

    async def sample(self, draft: Draft) -> Sampled:
        self.drafts.append(draft)
        ids = self._turns.pop(0)
        return Sampled(ids, [VersionSpan(7, 0, len(ids))], "stop", [-0.5] * len(ids), requests=2)


def test_replies_have_no_behavior_logprob() -> None:
    requester = ScriptedRequester([1, 2], [3], [4, 5])
    player = Player(requester, ScriptedEnvironment(), 8)  # type: ignore[arg-type]
    draft = Draft(0, "g", 0, [9], SamplingParams(20, 1.0, 1.0, -1, [1]))
    episode = run_async(player.play(FakePrompt(0, [9]), draft))
    assert episode.ids == [1, 2, 60, 50, 3, 61, 50, 4, 5]
    assert episode.logprobs == [-0.5, -0.5, 0.0, 0.0, -0.5, 0.0, 0.0, -0.5, -0.5]
    assert (episode.finish_reason, episode.turns, episode.last_turn) == ("stop", 3, [4, 5])
    assert [sent.requests for sent in requester.drafts] == [0, 2, 4]
    assert [sent.params.max_new_tokens for sent in requester.drafts] == [20, 16, 13]


def test_a_configuration_and_its_environment_belong_together(tmp_path: Path) -> None:
    async def scenario(config: Config, environment: Any) -> None:
        build_controller(config, tmp_path, FakeTask(), FakeScorer(), environment=environment)

    with pytest.raises(ConfigError, match=r"task.environment is scripted:reply, .* was given no environment"):
        run_async(scenario(game_config(), None))
    with pytest.raises(ConfigError, match=r"task.environment is None, .* was given an environment"):
        run_async(scenario(small_config(), ScriptedEnvironment()))
