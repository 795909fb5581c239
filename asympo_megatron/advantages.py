"""Advantages of one group of rewards, in plain Python: the controller computes them and needs no torch.

Always on the *complete* group, before any response is masked, dropped or split off.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from asympo_megatron.errors import ConfigError, RewardError, UnknownNameError


def group_mean(rewards: Sequence[float]) -> list[float]:
    """A_i = r_i - mean(r)."""
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def mean_std(rewards: Sequence[float]) -> list[float]:
    """A_i = (r_i - mean(r)) / std(r), with the population standard deviation (GRPO, arXiv:2402.03300)."""
    centred = group_mean(rewards)
    # Scaled to about 1, so that squares neither vanish nor overflow; and centred again, because the division makes much
    # of what the mean lost by rounding where rewards hardly differ.
    _, exponent = math.frexp(max(map(abs, centred)))
    scaled = group_mean([math.ldexp(value, -exponent) for value in centred])
    std = math.hypot(*scaled) / math.sqrt(len(rewards))
    return [value / std for value in scaled]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """A_i = r_i - mean of the other rewards = G / (G - 1) (r_i - mean(r)) (RLOO, arXiv:2402.14740)."""
    size = len(rewards)
    return [value * size / (size - 1) for value in group_mean(rewards)]


def none(rewards: Sequence[float]) -> list[float]:
    """A_i = r_i. Not zero-sum within a group: meant for rewards that are already advantages."""
    return [float(reward) for reward in rewards]


ESTIMATORS: Mapping[str, Callable[[Sequence[float]], list[float]]] = MappingProxyType(
    {"group_mean": group_mean, "mean_std": mean_std, "leave_one_out": leave_one_out, "none": none}
)


def compute_advantages(rewards: Sequence[float], estimator: str) -> list[float]:
    """Advantages of one complete group, in float64.

    A group whose rewards are all equal gets exact zeros from every estimator but ``none``.

    Args:
        rewards: one raw reward per response.
        estimator: group_mean | mean_std | leave_one_out | none.

    Raises:
        UnknownNameError: no such estimator.
        RewardError: a reward is NaN or infinite.
        ConfigError: fewer than two rewards for an estimator that compares them.
    """
    if estimator not in ESTIMATORS:
        raise UnknownNameError("advantage.estimator", estimator, ESTIMATORS)
    for row, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise RewardError(f"reward {row} of the group is {reward}; rewards are finite numbers. Fix the scorer.")
    if estimator != "none":
        if len(rewards) < 2:
            raise ConfigError(
                f"advantage.estimator={estimator} compares the rewards of a group and got {len(rewards)}; "
                "it needs at least 2. Raise batch.group_size, or set advantage.estimator=none."
            )
        if min(rewards) == max(rewards):
            return [0.0] * len(rewards)
    return ESTIMATORS[estimator](rewards)


def min_responses(estimator: str) -> int:
    """Responses that a group must have for the estimator to compare anything."""
    return 1 if estimator == "none" else 2
