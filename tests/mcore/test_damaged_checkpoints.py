"""Checkpoints that say they are complete and are not what was saved: a run goes on from the one before."""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_programs import PROGRAM, build, make_rows

from asympo_megatron.errors import CheckpointError, DamagedCheckpointError
from asympo_megatron.mcore import Checkpoints, Learner
from asympo_megatron.mcore.marker import MARKER
from asympo_megatron.testing.megatron import run_ranks


def _saved(root: Path, steps: int = 3) -> tuple[Checkpoints, Learner, list[str]]:
    """Checkpoints of some steps, the learner behind the last, and the weights' checksum after each step."""
    _, _, learner = build({"config": {"batch": {"max_tokens_per_microbatch": 2048}}})
    checkpoints, checksums = Checkpoints(root, keep_last=9), [learner.checksum()]
    for step in range(steps):
        _step(learner, step)
        checkpoints.save(learner)
        checksums.append(learner.checksum())
    return checkpoints, learner, checksums


def _step(learner: Learner, step: int) -> None:
    learner.step([make_rows(step, 4)], 4)


def _shard(directory: Path) -> Path:
    return sorted(directory.glob("*.distcp"))[0]


def _flip_a_bit(directory: Path, values: torch.Tensor) -> None:
    """In the shard that holds these values."""
    sought = values.detach().numpy().tobytes()[:64]
    (shard,) = (file for file in directory.glob("*.distcp") if sought in file.read_bytes())
    data = bytearray(shard.read_bytes())
    data[data.index(sought) + 7] ^= 1
    shard.write_bytes(data)


def _change_a_weight(directory: Path, learner: Learner) -> None:
    _flip_a_bit(directory, next(learner.shards()).param)


def _change_a_moment(directory: Path, learner: Learner) -> None:
    (state, *_) = learner.optimizer.optimizer.state.values()
    _flip_a_bit(directory, state["exp_avg_sq"])


def _forget_digests(directory: Path) -> None:
    """As an earlier version saved it."""
    marker = json.loads((directory / MARKER).read_text())
    del marker["files"]
    (directory / MARKER).write_text(json.dumps(marker))


def _undigested(change: Callable[[Path, Learner], object]) -> Callable[[Path, Learner], object]:
    return lambda directory, learner: (change(directory, learner), _forget_digests(directory))


DAMAGE: dict[str, tuple[Callable[[Path, Learner], object], str]] = {
    "truncated": (lambda d, _: os.truncate(_shard(d), 5000), r"__0_0.distcp has sha256 \w{16}\.\.\., was saved with"),
    "no shard": (lambda d, _: _shard(d).unlink(), r"__0_0.distcp cannot be read \(No such file"),
    "description": (lambda d, _: (d / ".metadata").write_bytes(b"junk"), r"is damaged: \.metadata has sha256"),
    "format": (lambda d, _: (d / "metadata.json").write_text("{"), "is damaged: metadata.json has sha256"),
    "a bit of a weight": (_change_a_weight, "distcp has sha256"),
    "a bit of a moment": (_change_a_moment, "distcp has sha256"),
    "truncated, no digests": (_undigested(lambda d, _: os.truncate(_shard(d), 5000)), "could not be read"),
    "description, no digests": (_undigested(lambda d, _: (d / ".metadata").write_bytes(b"x")), "could not be read"),
    "a bit of a weight, no digests": (_undigested(_change_a_weight), "was saved with weights of checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_is_named_and_used(
    tmp_path: Path, one_rank: None, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checkpoints, learner, checksums = _saved(tmp_path)
    change, reason = DAMAGE[damage]
    change(tmp_path / "step_000003", learner)
    _, _, resumed = build({"config": {"batch": {"max_tokens_per_microbatch": 2048}}})
    with caplog.at_level(logging.WARNING):
        assert checkpoints.resume(resumed) == tmp_path / "step_000002"
    assert re.search(reason, caplog.text)
    assert "step_000003" in caplog.text
    assert "using step_000002" in caplog.text
    assert (resumed.step_count, resumed.checksum()) == (2, checksums[2])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == ["step_000001", "step_000002"]
    assert names[2].startswith("step_000003.")
    assert names[2].endswith(".damaged")
    _step(resumed, 2)  # the moments are those of step 2, too
    assert resumed.checksum() == checksums[3]
    checkpoints.save(resumed)
    assert checkpoints.resume(resumed) == tmp_path / "step_000003"


def test_without_a_good_one_nothing_is_touched(tmp_path: Path, one_rank: None) -> None:
    checkpoints, learner, _ = _saved(tmp_path, 2)
    for step in (1, 2):
        os.truncate(_shard(tmp_path / f"step_{step:06d}"), 5000)
    with pytest.raises(DamagedCheckpointError, match=r"step_000002 is damaged: __0_0\.distcp has sha256"):
        checkpoints.resume(learner)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_one_of_another_model_is_not_damaged(tmp_path: Path, one_rank: None) -> None:
    checkpoints, _, _ = _saved(tmp_path, 2)
    _, _, other = build({"hf": {"intermediate_size": 64}})
    with pytest.raises(CheckpointError, match="step_000002 holds a model with ffn_size=48"):
        checkpoints.resume(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_no_checkpoint_at_all(tmp_path: Path, one_rank: None) -> None:
    _, _, learner = build({})
    assert Checkpoints(tmp_path, 2).resume(learner) is None


@pytest.mark.slow
def test_ranks_skip_the_same_one(tmp_path: Path) -> None:
    """The shard of one rank is cut: both must notice, or one would wait for the other."""
    for seen in run_ranks(f"{PROGRAM}:resumed_from_damaged", 2, {"root": str(tmp_path)}, timeout_s=400):
        assert seen == {"from": "step_000001", "step": 1, "same": True}
