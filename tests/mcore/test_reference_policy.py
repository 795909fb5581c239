"""Which weights the reference policy of a training run has: at the start, by configuration, after a resume."""

from pathlib import Path
from typing import Any

import pytest
from rank_programs import HF, make_config, make_rows

from asympo_megatron.errors import ConfigError
from asympo_megatron.mcore import Checkpoints, Learner, Row, initialize, shutdown
from asympo_megatron.objectives import build_objective, penalize_kl
from asympo_megatron.trainer.run import _load_weights

pytestmark = pytest.mark.usefixtures("one_rank")


def started(checkpoints: Checkpoints, kl_coef: float = 0.1, **sections: Any) -> Learner:
    """A learner as `asympo train` has it when its loop begins."""
    shutdown()
    config = make_config(batch={"max_tokens_per_microbatch": 2048}, **sections)
    learner = Learner(config, HF, penalize_kl(build_objective("reinforce"), kl_coef), initialize(config))
    _load_weights(config, learner, checkpoints)
    return learner


def step(learner: Learner, seed: int) -> dict[str, float]:
    return learner.step(learner.score([make_rows(seed)], "reference"), 16)


def scores(learner: Learner, which: str) -> list[Any]:
    (rows,) = learner.score([[Row([1, 2], [3, 4, 5], [1, 1, 1], 1.0)]], which)
    return [rows[0].reference_logprobs if which == "reference" else rows[0].proximal_logprobs]


def test_a_resumed_run_has_the_reference_it_began_with(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    first = started(checkpoints)
    initial = scores(first, "old")
    step(first, 0)
    checkpoints.save(first)
    straight = [step(first, 1), step(first, 2)]
    resumed = started(checkpoints)
    assert resumed.step_count == 1
    assert scores(resumed, "reference") == initial
    assert scores(resumed, "old") != initial
    assert [step(resumed, 1), step(resumed, 2)] == straight  # bit for bit, the penalty included


def test_model_reference_names_other_weights_than_the_initial_ones(tmp_path: Path) -> None:
    elsewhere = Checkpoints(tmp_path / "other", 2)
    other = started(elsewhere)
    initial = scores(other, "old")
    step(other, 0)
    elsewhere.save(other)
    wanted = scores(other, "old")
    learner = started(Checkpoints(tmp_path / "own", 2), model={"reference": str(tmp_path / "other")})
    assert scores(learner, "reference") == wanted
    assert scores(learner, "old") == initial
    assert step(learner, 0)["reference_kl"] > 0


def test_a_reference_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing reads a reference policy. Set objective.kl_coef"):
        started(Checkpoints(tmp_path, 2), kl_coef=0.0, model={"reference": str(tmp_path)})
