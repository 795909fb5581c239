"""Long responses are trained like short ones: the lengths of trained responses have the distribution of sampled ones.

A response that is overtaken goes on, across weight updates, and is trained later. The opt-in policy that drops late
responses is biased towards short ones: the control.
"""

from dataclasses import replace

import async_speedup
import numpy as np
from decoding_engine import EngineModel

WORLD = async_speedup.World(
    sigma=1.4, engines=2, engine=EngineModel(16, 0.01, 0.0002, 0.5), groups_per_step=8, group_size=4, steps=160
)


def distance(trained: np.ndarray, sampled: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic of two samples, in units of its 0.1% quantile."""
    grid = np.sort(np.concatenate([trained, sampled]))
    shares = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (trained, sampled)]
    quantile = 1.95 * np.sqrt(1 / len(trained) + 1 / len(sampled))
    return float(np.abs(shares[0] - shares[1]).max() / quantile)


def trained_lengths(course: async_speedup.Course) -> np.ndarray:
    """Of the steps between filling and draining: over a whole run nothing could differ but by drops."""
    return np.array([length for step in course.steps[20:-20] for length in step.lengths])


def test_trained_lengths_are_distributed_as_sampled_ones():
    course = async_speedup.run(WORLD, 1)
    sampled = WORLD.lengths().ravel()
    assert sum(step.over_bound for step in course.steps) > 500, "too few responses were overtaken to see a bias"
    assert distance(trained_lengths(course), sampled) <= 0.5
    every = [length for step in course.steps for length in step.lengths]
    assert sorted(every) == sorted(sampled), "each response is trained, once"


def test_dropping_late_responses_is_noticed():
    course = async_speedup.run(replace(WORLD, lag_policy="drop"), 1)
    sampled = WORLD.lengths().ravel()
    assert distance(trained_lengths(course), sampled) > 1
    assert trained_lengths(course).mean() < 0.9 * sampled.mean()
