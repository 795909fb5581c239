"""From answers to scored groups: overlong rules, advantages before masks, replayed groups."""

from pathlib import Path

import pytest
from rollout_world import VOCAB, run_async, small_config, world

from asympo_megatron.config.rollout_schema import SamplingConfig
from asympo_megatron.errors import RecordError
from asympo_megatron.records import Group, Response, VersionSpan, write_groups
from asympo_megatron.rollout import build_controller
from asympo_megatron.rollout.grading import grade
from asympo_megatron.rollout.lease import batch_figures, manifest
from asympo_megatron.rollout.ledger import ScoredGroup
from asympo_megatron.rollout.rows import summarize
from asympo_megatron.testing.fake_engine import FakeEngine

GROUP = Group(
    [5, 6],
    [
        Response([1, 2, 3], [1, 1, 1], 1.0, [VersionSpan(4, 0, 3)], None, "stop"),
        Response([1, 2, 3, 4], [1, 1, 0, 1], 1.0, [VersionSpan(3, 0, 1), VersionSpan(5, 1, 4)], None, "length"),
        Response([7], [1], 0.0, [VersionSpan(4, 0, 1)], None, "stop"),
        Response([8, 9], [1, 1], 0.0, [VersionSpan(5, 0, 2)], None, "stop"),
    ],
    group_id=11,
    prompt_index=11,
)


@pytest.mark.parametrize(
    ("overlong", "rewards", "advantages", "trained"),
    [
        ("train", [1.0, 1.0, 0.0, 0.0], [0.5, 0.5, -0.5, -0.5], [3, 3, 1, 2]),
        ("mask", [1.0, 1.0, 0.0, 0.0], [0.5, 0.5, -0.5, -0.5], [3, 0, 1, 2]),
        ("penalize", [1.0, 1.0, 0.0, 0.0], [0.6, 0.2, -0.4, -0.4], [3, 3, 1, 2]),
    ],
)
def test_overlong_rules(overlong: str, rewards: list[float], advantages: list[float], trained: list[int]) -> None:
    """mask: advantages come from the complete group, so they still sum to 0 over it; penalize: they come from
    the lowered reward, and the reward that is kept and reported stays the scorer's."""
    stored = grade(GROUP, SamplingConfig(overlong=overlong, overlong_penalty=0.4), "group_mean")
    assert [response.reward for response in stored.group.responses] == pytest.approx(rewards, abs=1e-12)
    assert stored.advantages == pytest.approx(advantages, abs=1e-12)
    assert sum(stored.advantages) == pytest.approx(0.0, abs=1e-12)
    assert [response.trained_tokens for response in stored.group.responses] == trained
    assert [response.ids for response in stored.group.responses] == [response.ids for response in GROUP.responses]


def test_lags_and_figures_by_hand() -> None:
    """Version 3 is of step 7, 4 of step 8, 5 of step 10; the batch is that of step 9."""
    summary = summarize(grade(GROUP, SamplingConfig(), "group_mean"))
    steps = {3: 7, 4: 8, 5: 10}
    groups = [ScoredGroup(11, summary, 7)]
    rows = manifest(9, groups, steps)
    assert [row.lag for row in rows] == [1, 2, 1, 0], "oldest version of each response; never negative"
    assert [(row.group_id, row.row, row.prompt_tokens, row.response_tokens) for row in rows] == [
        (11, 0, 2, 3), (11, 1, 2, 4), (11, 2, 2, 1), (11, 3, 2, 2),
    ]  # fmt: skip
    figures = batch_figures(9, groups, steps, max_lag_steps=1)
    assert figures == {
        "reward/mean": 0.5,
        "reward/zero_variance_groups": 0.0,
        "lag/mean": 1.0,
        "lag/max": 2,
        "lag/min": 0,
        "lag/over_bound": 1,
        "lag/negative": 1,
        "rollout/response_tokens_mean": 2.5,
        "rollout/truncated_fraction": 0.25,
        "rollout/spanning_fraction": 0.25,
        "rollout/turns_mean": 1.0,
        "rollout/out_of_turns_fraction": 0.0,
    }


def test_truncated_responses_through_the_whole_path(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(VOCAB, length=lambda body: 4 if body["rid"].split(".")[3] == "0000" else 20)
        config = small_config(rollout__sampling__overlong="mask", rollout__max_lag_steps=0)
        async with world(tmp_path, config, [engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            reply = await w.trainer.lease(0)
            assert [(row.response_tokens, row.trained_tokens) for row in reply.responses] == [(4, 4), (8, 0)] * 2
            assert [row.advantage for row in reply.responses] == [-0.5, 0.5] * 2
            assert reply.metrics["rollout/truncated_fraction"] == 0.5
            assert [sample.mask for sample in await w.trainer.payload(reply)] == [[1] * 4, [0] * 8] * 2

    run_async(scenario())


def replay_file(path: Path, count: int) -> Path:
    groups = [
        Group(
            [10 + k, 3],
            [
                Response([k % VOCAB, 2], [1, 1], float(k % 3), [VersionSpan(5, 0, 2)], [-0.1, -0.2]),
                Response([k % VOCAB, 4, 6], [1, 0, 1], 0.0, [VersionSpan(6, 0, 3)], [-0.3, -0.4, -0.5], "length"),
            ],
        )
        for k in range(count)
    ]
    write_groups(path, groups)
    return path


def test_replay_through_journal_and_leases(tmp_path: Path) -> None:
    """Groups come in the order of the file, again from its beginning when it ends; a resume gets the same."""

    async def scenario() -> None:
        path = replay_file(tmp_path / "groups.jsonl", 5)
        config = small_config(rollout__source="replay", rollout__replay=str(path), rollout__sampling__overlong="mask")
        async with world(tmp_path, config, []) as w:
            await w.trainer.attach()
            assert await w.trainer.publish(0) == 0
            replies = [await w.trainer.lease(step) for step in range(6)]
            samples = [await w.trainer.payload(reply) for reply in replies]
            prompts = [sample.prompt_ids[0] for step in samples for sample in step[::2]]
            assert prompts == [10 + k % 5 for k in range(12)]
            assert [row.lag for reply in replies for row in reply.responses] == [0] * 24
            assert samples[0][1].mask == [1, 0, 1], "as recorded: no second overlong rule"
            assert samples[0][1].behavior_logprobs == [-0.3, -0.4, -0.5]
            assert [row.advantage for row in replies[0].responses] == [0.0, 0.0, 0.5, -0.5]
            assert (await w.trainer.finish(6)).done
            await w.trainer.attach(3)
            again = [await w.trainer.lease(step) for step in range(3, 6)]
            assert [reply.responses for reply in again] == [reply.responses for reply in replies[3:]]
            async with w.client.post("/engines", json={"url": "http://127.0.0.1:1"}) as answer:
                assert "rollout.source=replay uses no engines" in (await answer.json())["error"]

    run_async(scenario())


def test_replay_stays_within_the_budget(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = replay_file(tmp_path / "groups.jsonl", 3)
        config = small_config(rollout__source="replay", rollout__replay=str(path), rollout__max_lag_steps=1)
        async with world(tmp_path, config, []) as w:
            await w.trainer.attach()
            await w.trainer.lease(0)
            await w.until(lambda: w.groups.live == (1 + 1 + 1) * 2)
            await w.trainer.lease(1)
            await w.until(lambda: w.groups.live == (1 + 2 + 1) * 2)

    run_async(scenario())


def test_replay_file_without_groups(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")

    async def scenario(path: str) -> None:
        build_controller(small_config(rollout__source="replay", rollout__replay=path), tmp_path, None, None)

    with pytest.raises(RecordError, match="holds no group"):
        run_async(scenario(str(tmp_path / "empty.jsonl")))
    with pytest.raises(RecordError, match="does not exist"):
        run_async(scenario(str(tmp_path / "missing.jsonl")))
