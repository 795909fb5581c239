"""Answers and rewards become a scored group: overlong rule, advantages on the complete group, then masks."""

from collections.abc import Sequence

import msgspec

from asympo_megatron.advantages import compute_advantages
from asympo_megatron.config.schema import SamplingConfig
from asympo_megatron.records import Group, Response
from asympo_megatron.rollout.requester import Sampled
from asympo_megatron.rollout.rows import StoredGroup


def grade(group: Group, sampling: SamplingConfig, estimator: str) -> StoredGroup:
    """Apply the rule for truncated responses and compute advantages.

    ``penalize`` lowers the reward before advantages are taken; ``mask`` takes the loss of a truncated response away
    after they were computed on the complete group, so the others keep theirs and the response stays in N.
    """
    responses = group.responses
    if sampling.overlong == "penalize":
        responses = [_penalized(response, sampling.overlong_penalty) for response in responses]
    advantages = compute_advantages([response.reward for response in responses], estimator)
    if sampling.overlong == "mask":
        responses = [_masked(response) for response in responses]
    return StoredGroup(Group(group.prompt_ids, responses, group.group_id, group.prompt_index), advantages)


def raw_group(
    group_id: int, prompt_index: int, prompt_ids: list[int], answers: Sequence[Sampled], rewards: Sequence[float]
) -> Group:
    """A group as it was sampled: every token trained, rewards as the scorer gave them."""
    responses = [
        Response(
            ids=answer.ids,
            mask=[1] * len(answer.ids),
            reward=float(reward),
            versions=answer.versions,
            behavior_logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
        )
        for answer, reward in zip(answers, rewards, strict=True)
    ]
    return Group(prompt_ids, responses, group_id, prompt_index)


def _penalized(response: Response, penalty: float) -> Response:
    if response.finish_reason != "length":
        return response
    return _with(response, response.mask, response.reward - penalty)


def _masked(response: Response) -> Response:
    if response.finish_reason != "length":
        return response
    return _with(response, [0] * len(response.ids), response.reward)


def _with(response: Response, mask: list[int], reward: float) -> Response:
    return msgspec.structs.replace(response, mask=mask, reward=reward)
