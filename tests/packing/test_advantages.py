"""Advantages: hand values, exact zeros, and rewards that must be refused."""

import math
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asympo_megatron.advantages import ESTIMATORS, compute_advantages
from asympo_megatron.errors import ConfigError, RewardError, UnknownNameError

RELATIVE = ["group_mean", "mean_std", "leave_one_out"]
REWARDS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=16)


@pytest.mark.parametrize(
    ("estimator", "advantages"),
    [
        ("group_mean", [0.75, -0.25, -0.25, -0.25]),
        ("leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("mean_std", [math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]),
        ("none", [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_hand_values(estimator, advantages):
    assert compute_advantages([1, 0, 0, 0], estimator) == pytest.approx(advantages, rel=1e-15)


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    rewards = [0.3, 1.0, -2.0, 0.5]
    slow = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert compute_advantages(rewards, "leave_one_out") == pytest.approx(slow, rel=1e-14)


@pytest.mark.parametrize("estimator", RELATIVE)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1e300, 1e-310])
def test_equal_rewards_give_exact_zeros(estimator, reward):
    """0.1 * 3 / 3 is not 0.1: subtracting a rounded mean would leave 1e-17, which mean_std would blow up to 1."""
    assert compute_advantages([reward] * 3, estimator) == [0.0] * 3


@pytest.mark.parametrize("estimator", RELATIVE)
@given(rewards=REWARDS)
@example(rewards=[0.0, 5e-324])
@example(rewards=[1.0, 1.0000000000000002])
def test_sum_is_zero(estimator, rewards):
    advantages = compute_advantages(rewards, estimator)
    assert abs(math.fsum(advantages)) <= 1e-12 * max(1.0, *map(abs, rewards), *map(abs, advantages)) * len(rewards)


@given(rewards=REWARDS, factor=st.floats(1e-3, 1e3))
def test_mean_std_has_unit_variance_and_no_scale(rewards, factor):
    advantages = compute_advantages(rewards, "mean_std")
    if max(rewards) - min(rewards) > 1e-3:
        assert math.fsum(a * a for a in advantages) / len(rewards) == pytest.approx(1, rel=1e-6)
        scaled = compute_advantages([factor * r for r in rewards], "mean_std")
        assert scaled == pytest.approx(advantages, rel=1e-6, abs=1e-6)


def test_mean_std_of_extreme_rewards():
    assert compute_advantages([1e-200, -1e-200], "mean_std") == pytest.approx([1, -1])
    assert compute_advantages([1e200, -1e200], "mean_std") == pytest.approx([1, -1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_non_finite_reward_is_refused(estimator, bad):
    with pytest.raises(RewardError, match=rf"reward 1 of the group is {bad}; rewards are finite"):
        compute_advantages([0.0, bad], estimator)


@pytest.mark.parametrize("estimator", RELATIVE)
@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_a_lone_reward_is_refused(estimator, rewards):
    with pytest.raises(ConfigError, match=rf"{estimator} compares .* got {len(rewards)}; .*batch.group_size.*none"):
        compute_advantages(rewards, estimator)


def test_a_lone_reward_without_comparison():
    assert compute_advantages([2], "none") == [2.0]


def test_unknown_estimator_names_the_nearest():
    with pytest.raises(UnknownNameError, match="'group_men': did you mean 'group_mean'"):
        compute_advantages([0.0, 1.0], "group_men")


def test_no_torch_needed():
    """The controller computes advantages; its process loads neither torch nor numpy for them."""
    program = "import sys, asympo_megatron.advantages; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
