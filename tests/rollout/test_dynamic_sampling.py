"""Groups without an advantage are replaced where that is asked for, and what is discarded is seen in the figures."""

from pathlib import Path

import pytest
from rollout_world import FakePrompt, FakeScorer, run_async, small_config, world

from asympo_megatron.config.validate import validate
from asympo_megatron.errors import ConfigError
from asympo_megatron.records import Group, Response, VersionSpan
from asympo_megatron.rollout.admission import LagRule
from asympo_megatron.rollout.discards import Discards
from asympo_megatron.rollout.journal import Journal
from asympo_megatron.rollout.ledger import Ledger
from asympo_megatron.rollout.rows import GroupState, ResponseSummary, StoredGroup, VersionRow


class UniformScorer(FakeScorer):
    """Both responses get ``rewards[prompt]``; those of other prompts 0 and 1."""

    def __init__(self, rewards: dict[int, float]) -> None:
        super().__init__()
        self._rewards = rewards

    async def score(self, prompt: FakePrompt, responses: list[list[int]], histories: object = None) -> list[float]:
        usual = await super().score(prompt, responses, histories)
        return [self._rewards.get(prompt.index, reward) for reward in usual]


def _summary(reward: float, tokens: int) -> ResponseSummary:
    return ResponseSummary(4, tokens, tokens, 0.0, reward, [0], False)


@pytest.mark.parametrize("asked", [True, False])
def test_groups_without_advantage_are_replaced_only_where_asked_for(tmp_path: Path, asked: bool) -> None:
    """With max_lag_steps 0 two groups may live: the slots of dropped ones return, or the batch would never be full."""

    async def scenario() -> None:
        config = small_config(rollout__max_lag_steps=0, rollout__dynamic_sampling=asked)
        async with world(tmp_path, config, scorer=UniformScorer({0: 1.0, 2: 0.25})) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            reply = await w.trainer.lease(0)
            trained = sorted({row.group_id for row in reply.responses})
            figures = reply.metrics
            assert figures["reward/zero_variance_groups"] == (0.0 if asked else 0.5)
            if not asked:
                assert trained == [0, 1]
                assert (figures["rollout/discarded_groups"], figures["rollout/dropped"]) == (0, 0)
                assert "rollout/discarded_reward_mean" not in figures
                return
            assert trained == [1, 3]
            assert (figures["rollout/discarded_groups"], figures["rollout/dropped"]) == (2, 2)
            assert figures["rollout/discarded_reward_mean"] == (1.0 + 0.25) / 2
            assert figures["rollout/discarded_response_tokens_mean"] == reply.responses[0].response_tokens == 4
            rows = {row.group_id: (row.state, row.reason) for row in w.controller.parts.journal.rows()}
            assert rows[2] == (GroupState.DROPPED, "dynamic sampling: no advantage, rewards [0.25]")
            await w.trainer.publish(1)
            assert (await w.trainer.lease(1)).metrics["rollout/discarded_groups"] == 0, "counted once"

    run_async(scenario())


def test_a_task_without_any_advantage_ends_the_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = small_config(rollout__dynamic_sampling=True)
        async with world(tmp_path, config, scorer=UniformScorer(dict.fromkeys(range(99), 1.0))) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            with pytest.raises(Exception, match=r"no advantage in 20 groups in a row, the last with rewards \[1.0\]"):
                await w.trainer.lease(0)

    run_async(scenario())


def test_it_needs_engines() -> None:
    config = small_config(rollout__dynamic_sampling=True)
    config.rollout.source = "replay"
    config.rollout.replay = "groups.jsonl"
    with pytest.raises(ConfigError, match=r"rollout.dynamic_sampling needs rollout.source=engines, not replay"):
        validate(config)


def test_what_the_lag_policy_drops_is_counted_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite", "run", "hash")
    ledger = Ledger(journal)
    for number, step in ((0, 0), (1, 5)):
        ledger.publish(VersionRow(number, step, 1, f"weights-{step}", f"/weights/{number}"))
    ledger.admit(2)
    for group_id, size in ((0, 7), (1, 2)):  # the first by weights of step 0, the second by weights of step 5
        row = Response([3] * size, [1] * size, 0.5, [VersionSpan(group_id, 0, size)])
        ledger.finish_group(group_id, StoredGroup(Group([5], [row, row], group_id, group_id), [0.0, 0.0]))
    leased = ledger.form_lease(5, LagRule(1, 1, 10, "drop"))
    assert leased is not None
    assert [group.group_id for group in leased] == [1]
    assert ledger.discards.take() == {
        "rollout/discarded_groups": 1,
        "rollout/discarded_reward_mean": 0.5,
        "rollout/discarded_response_tokens_mean": 7.0,
    }
    journal.close()


def test_means_are_over_responses_and_taken_once() -> None:
    discards = Discards()
    discards.add([_summary(1.0, 3), _summary(0.0, 5)])
    discards.add([_summary(1.0, 1)])
    assert discards.take() == {
        "rollout/discarded_groups": 2,
        "rollout/discarded_reward_mean": pytest.approx(2 / 3, abs=1e-15),
        "rollout/discarded_response_tokens_mean": 3.0,
    }
    assert discards.take() == {"rollout/discarded_groups": 0}
