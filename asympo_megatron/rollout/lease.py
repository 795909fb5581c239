"""A lease as the trainer sees it: the manifest of a batch and the figures of the controller."""

from collections.abc import Mapping, Sequence

from asympo_megatron.protocol import LeasedResponse
from asympo_megatron.rollout.admission import NO_LAG, lag_of
from asympo_megatron.rollout.ledger import ScoredGroup
from asympo_megatron.rollout.rows import ResponseSummary


def manifest(step: int, groups: Sequence[ScoredGroup], version_steps: Mapping[int, int]) -> list[LeasedResponse]:
    """One entry a response, in the order of groups and rows. A pure function of what the journal holds: a lease that
    is asked for again is the same."""
    return [
        LeasedResponse(
            group_id=group.group_id,
            row=row,
            prompt_tokens=response.prompt_tokens,
            response_tokens=response.response_tokens,
            trained_tokens=response.trained_tokens,
            advantage=response.advantage,
            reward=response.reward,
            lag=lag_of(step, _sampled_step(response, version_steps)),
        )
        for group in groups
        for row, response in enumerate(group.responses)
    ]


def batch_figures(
    step: int, groups: Sequence[ScoredGroup], version_steps: Mapping[int, int], max_lag_steps: int
) -> dict[str, float]:
    """Rewards, lags and lengths of a batch under their names in metrics.jsonl."""
    rows = [response for group in groups for response in group.responses]
    raw_lags = [step - _sampled_step(row, version_steps) for row in rows]
    lags = [max(0, lag) for lag in raw_lags]
    zero_variance = sum(len({row.reward for row in group.responses}) == 1 for group in groups)
    return {
        "reward/mean": sum(row.reward for row in rows) / len(rows),
        "reward/zero_variance_groups": zero_variance / len(groups),
        "lag/mean": sum(lags) / len(lags),
        "lag/max": max(lags),
        "lag/min": min(lags),
        "lag/over_bound": sum(lag > max_lag_steps for lag in lags),
        "lag/negative": sum(-NO_LAG // 2 < lag < 0 for lag in raw_lags),
        "rollout/response_tokens_mean": sum(row.response_tokens for row in rows) / len(rows),
        "rollout/truncated_fraction": sum(row.truncated for row in rows) / len(rows),
        "rollout/spanning_fraction": sum(len(row.versions) > 1 for row in rows) / len(rows),
        "rollout/turns_mean": sum(row.turns for row in rows) / len(rows),
        "rollout/out_of_turns_fraction": sum(row.out_of_turns for row in rows) / len(rows),
    }


def _sampled_step(response: ResponseSummary, version_steps: Mapping[int, int]) -> int:
    return min((version_steps[version] for version in response.versions), default=NO_LAG)
