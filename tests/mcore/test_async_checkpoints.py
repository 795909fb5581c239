"""Checkpoints written while training goes on: the bits of the moment they were begun, or nothing."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from async_programs import PROGRAM, held_writer, live_tensors, trained_on
from rank_programs import build, make_rows

from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore import Checkpoints, checkpoint_save
from asympo_megatron.mcore.marker import MARKER
from asympo_megatron.testing.megatron import RankError, run_ranks


def _case(tmp_path: Path, name: str, **config: Any) -> dict[str, Any]:
    return {
        "config": config,
        "at_once": str(tmp_path / f"{name}-at-once"),
        "meanwhile": str(tmp_path / f"{name}-meanwhile"),
    }


def _check(result: dict[str, Any], case: dict[str, Any]) -> None:
    assert result["written before"] == [False, False]
    straight = [result["figures"], result["checksum"]]
    assert result["resumed"] == [straight, straight], "another state was saved than that of the moment"
    shards = sorted(path.name for path in Path(case["at_once"]).glob("*.distcp"))
    assert shards
    for shard in shards:
        one, other = (Path(case[which]) / shard for which in ("at_once", "meanwhile"))
        assert one.read_bytes() == other.read_bytes(), shard
    for which in ("at_once", "meanwhile"):
        folder = Path(case[which])
        files = json.loads((folder / MARKER).read_text())["files"]
        assert set(files) == {path.name for path in folder.iterdir()} - {MARKER}, "a file has no digest"


@pytest.mark.parametrize("distributed", [False, True])
def test_the_bits_are_those_of_a_save_at_once(tmp_path: Path, one_rank: None, distributed: bool) -> None:
    case = _case(tmp_path, "one", optimizer={"distributed": distributed})
    _check(trained_on("one", case), case)


def test_without_a_copy_the_saved_weights_are_of_no_step(
    tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutant: the thread writes the weights that are trained meanwhile."""
    monkeypatch.setattr(checkpoint_save, "snapshot", live_tensors)
    with pytest.raises(CheckpointError, match=r"one-meanwhile was saved with weights of checksum .*damaged"):
        trained_on("one", _case(tmp_path, "one"))


@pytest.mark.slow
def test_two_ranks_in_every_layout(tmp_path: Path) -> None:
    cases = {
        "data-sharded": _case(tmp_path, "data-sharded", optimizer={"distributed": True}),
        "tensor": _case(tmp_path, "tensor", parallel={"tensor": 2}),
        "pipeline": _case(tmp_path, "pipeline", parallel={"pipeline": 2}, optimizer={"distributed": True}),
    }
    for rank in run_ranks(f"{PROGRAM}:trained_cases", 2, {"cases": cases}, timeout_s=240):
        for name, case in cases.items():
            _check(rank[name], case)


def _begun(root: Path, keep_last: int = 2) -> tuple[Checkpoints, Any]:
    """A checkpoint of step 1, and a learner at step 2."""
    _, _, learner = build({"config": {"batch": {"max_tokens_per_microbatch": 2048}}})
    checkpoints = Checkpoints(root, keep_last)
    for step in range(2):
        learner.step([make_rows(step, 4)], 4)
        if step == 0:
            checkpoints.save(learner)
    return checkpoints, learner


def test_it_is_seen_when_it_is_complete_and_not_before(tmp_path: Path, one_rank: None) -> None:
    checkpoints, learner = _begun(tmp_path, keep_last=1)
    assert not checkpoints.pending
    with held_writer() as go:
        checkpoints.begin(learner, background=True)
        assert checkpoints.pending
        assert not checkpoints.ready(wait=False)
        assert checkpoints.newest() == tmp_path / "step_000001", "the older one stays until the new one is whole"
        go.set()
    assert checkpoints.ready(wait=True)
    saved = checkpoints.complete()
    assert (saved.step, saved.oldest_step) == (2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]
    checkpoints.begin(learner, background=True)  # this step is saved already
    assert checkpoints.ready(wait=False)
    assert checkpoints.complete() == saved


def test_what_is_written_is_held_once(tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the thread writes, the tensors that were gathered for it are gone; what is left is the learner's."""
    taken: list[weakref.ref[torch.Tensor]] = []
    snapshot = checkpoint_save.snapshot

    def noted(request: Any) -> list[Any]:
        taken.extend(weakref.ref(tensor) for *_, (_, pairs) in request.async_fn_args[1] for _, tensor in pairs)
        return snapshot(request)

    monkeypatch.setattr(checkpoint_save, "snapshot", noted)
    _, _, learner = build({"config": {"optimizer": {"distributed": True}}})
    with held_writer() as go:
        saving = checkpoint_save.Saving(learner, tmp_path / "step", background=True)
        gc.collect()
        own = {param.data_ptr() for chunk in learner.chunks for param in chunk.parameters()}
        left = [tensor for tensor in (ref() for ref in taken) if tensor is not None]
        assert len(left) < len(taken) / 2, "two moments and a weight: at most the weights are left"
        assert all(tensor.data_ptr() in own for tensor in left)
        go.set()
    saving.complete()


def test_a_rank_killed_in_the_middle_leaves_the_checkpoint_before(tmp_path: Path, one_rank: None) -> None:
    with pytest.raises(RankError, match="rank 1 ended with code -9"):
        run_ranks(f"{PROGRAM}:killed", 2, {"root": str(tmp_path)}, timeout_s=400)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "step_000001"
    assert [name[:12] for name in names[1:]] == ["step_000002."], "it died elsewhere than in the middle of writing"
    assert list((tmp_path / names[1]).glob("*.distcp"))
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.newest() == tmp_path / "step_000001"
    _, _, learner = build({})
    learner.load(tmp_path / "step_000001")
    learner.step([make_rows(1, 4)], 4)
    checkpoints.save(learner)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_a_rank_that_cannot_write_is_named_on_every_rank(tmp_path: Path) -> None:
    for seen in run_ranks(f"{PROGRAM}:full_disk", 2, {"root": str(tmp_path)}, timeout_s=400):
        for rank in (0, 1):
            assert "step_000002 could not be written: " in seen[f"rank {rank}"]
            assert "No space left on device" in seen[f"rank {rank}"]
            assert "Free some space, or change run.root" in seen[f"rank {rank}"]
            assert seen[f"newest after {rank}"] == "step_000001"
        assert seen["files"] == ["step_000001", "step_000002"]
