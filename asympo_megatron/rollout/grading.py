"""Answers and rewards become a scored group: overlong rule, advantages on the complete group, then masks."""

from collections.abc import Sequence

import msgspec

from asympo_megatron.advantages import compute_advantages
from asympo_megatron.config.rollout_schema import SamplingConfig
from asympo_megatron.records import Group, Response
from asympo_megatron.rollout.episodes import Episode
from asympo_megatron.rollout.rows import StoredGroup


def grade(group: Group, sampling: SamplingConfig, estimator: str) -> StoredGroup:
    """Apply the rule for truncated responses and compute advantages.

    ``penalize`` lowers the reward of which advantages are taken, and nothing else: the stored reward is the scorer's.
    ``mask`` takes the loss of a truncated response away after advantages were computed on the complete group, so the
    others keep theirs and the response stays in N.
    """
    penalty = sampling.overlong_penalty if sampling.overlong == "penalize" else 0.0
    rewards = [response.reward - penalty * _truncated(response) for response in group.responses]
    advantages = compute_advantages(rewards, estimator)
    responses = group.responses
    if sampling.overlong == "mask":
        responses = [_masked(response) if _truncated(response) else response for response in responses]
    return StoredGroup(Group(group.prompt_ids, responses, group.group_id, group.prompt_index), advantages)


def raw_group(
    group_id: int, prompt_index: int, prompt_ids: list[int], answers: Sequence[Episode], rewards: Sequence[float]
) -> Group:
    """A group as it was sampled: every sampled token trained, rewards as the scorer gave them."""
    responses = [
        Response(
            ids=answer.ids,
            mask=answer.mask,
            reward=float(reward),
            versions=answer.versions,
            behavior_logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
            turns=answer.turns,
        )
        for answer, reward in zip(answers, rewards, strict=True)
    ]
    return Group(prompt_ids, responses, group_id, prompt_index)


def _truncated(response: Response) -> bool:
    return response.finish_reason == "length"


def _masked(response: Response) -> Response:
    return msgspec.structs.replace(response, mask=[0] * len(response.ids))
