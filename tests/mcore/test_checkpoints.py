"""Checkpoints: bit-exact resume, any layout to any layout, partial ones skipped, a full disk leaves nothing."""

import json
import logging
import re
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_programs import PROGRAM, build, make_rows, microbatches, train

from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore import Checkpoints, Learner, distopt
from asympo_megatron.mcore.marker import MARKER
from asympo_megatron.testing.megatron import run_ranks

SPLIT = {"batch": {"max_tokens_per_microbatch": 2048}}


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("save_at", [0, 2])
def test_resume_is_bit_exact(tmp_path: Path, one_rank: None, distributed: bool, save_at: int) -> None:
    case: dict[str, Any] = {"config": {"optimizer": {"distributed": distributed, "schedule": "linear"}}}
    path = tmp_path / "step"
    straight = train("straight", case)
    if save_at == 0:
        build(case)[2].save(path)
    else:
        train("first", {**case, "steps": save_at, "save_at": save_at, "save": str(path)})
    resumed = train("second", {**case, "steps": 4 - save_at, "load": str(path)})
    assert resumed["checksums"] == straight["checksums"][save_at:]
    assert resumed["figures"] == straight["figures"][save_at:]


def test_state_of_a_fused_optimizer_is_made_before_its_first_step(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop before step 1 saves a checkpoint of step 0. Megatron makes the state of Adams that are not torch's."""
    _, _, learner = build({"config": {"optimizer": {"distributed": True}}})
    monkeypatch.setattr(distopt, "_with_torch_adam", lambda _: iter(()))
    optimizers = [wrapper.optimizer for wrapper in learner.optimizer.chained_optimizers]
    assert not any(optimizer.state for optimizer in optimizers)
    distopt.prepare(learner.optimizer)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert all({"exp_avg", "exp_avg_sq"} <= optimizer.state[param].keys() for param in group["params"])


def test_forgetting_the_moments_is_noticed(tmp_path: Path, one_rank: None) -> None:
    """Mutant: weights without optimizer state do not resume."""
    straight = train("straight", {})
    train("first", {"steps": 2, "save_at": 2, "save": str(tmp_path / "step")})
    config, layout, learner = build({})
    learner.load(tmp_path / "step", weights_only=True)
    assert learner.checksum() == straight["checksums"][2]
    assert learner.step_count == 0
    rows = make_rows(2)
    learner.step(microbatches(rows, config, layout), len(rows))
    assert learner.checksum() != straight["checksums"][3]


@pytest.mark.parametrize("distributed", [False, True])
def test_changed_optimizer_settings_hold_after_a_resume(tmp_path: Path, one_rank: None, distributed: bool) -> None:
    """The next step is AdamW's by hand with the new lr, beta2 and eps, on the moments of the checkpoint."""
    first = {"distributed": distributed, "lr": 1e-3, "clip_grad": 0.0}
    changed = {**first, "lr": 4e-4, "min_lr": 1e-4, "beta1": 0.8, "beta2": 0.5, "eps": 1e-3, "weight_decay": 0.1}
    train("first", {"config": {"optimizer": first}, "steps": 2, "save_at": 2, "save": str(tmp_path / "step")})
    config, layout, learner = build({"config": {"optimizer": changed}})
    learner.load(tmp_path / "step")
    inner = getattr(learner.optimizer, "chained_optimizers", [learner.optimizer])[0].optimizer
    group = inner.param_groups[0]
    main = group["params"][0]
    before, state = main.detach().clone(), {name: value.clone() for name, value in inner.state[main].items()}
    rows = make_rows(2)
    assert learner.step(microbatches(rows, config, layout), len(rows))["lr"] == 4e-4
    assert (group["betas"], group["eps"], group["max_lr"], group["min_lr"]) == ((0.8, 0.5), 1e-3, 4e-4, 1e-4)
    first_moment, second_moment = inner.state[main]["exp_avg"], inner.state[main]["exp_avg_sq"]
    grad = (first_moment - 0.8 * state["exp_avg"]) / 0.2
    torch.testing.assert_close(second_moment, 0.5 * state["exp_avg_sq"] + 0.5 * grad**2, rtol=1e-4, atol=1e-9)
    assert int(inner.state[main]["step"]) == 3
    scaled = first_moment / (1 - 0.8**3) / ((second_moment / (1 - 0.5**3)).sqrt() + 1e-3)
    wanted = before * (1 - 4e-4 * group["weight_decay"]) - 4e-4 * scaled
    torch.testing.assert_close(main.detach(), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_any_layout_loads_what_any_layout_saved(tmp_path: Path, reference: dict[str, Any]) -> None:
    """Saved by one rank, and by two with a sharded optimizer; loaded under every pair of ranks and by one."""
    single, sharded = str(tmp_path / "single"), str(tmp_path / "sharded")
    train("single", {"steps": 2, "save_at": 2, "save": single})
    distributed = {"optimizer": {"distributed": True}}
    train("as sharded", {"config": distributed, "steps": 2, "save_at": 2, "save": str(tmp_path / "alone")})
    cases = {
        "save": {"config": distributed, "steps": 2, "save_at": 2, "save": sharded},
        "data": {"config": distributed, "load": sharded, "steps": 2},
        "tensor": {"config": {"parallel": {"tensor": 2}}, "load": single, "steps": 2},
        "sequence": {"config": {"parallel": {"tensor": 2, "sequence": True}}, "load": single, "steps": 2},
        "pipeline": {"config": {"parallel": {"pipeline": 2}}, "load": single, "steps": 2},
        "context": {"config": {"parallel": {"context": 2}}, "load": single, "steps": 2},
        "tensor-sharded": {"config": {"parallel": {"tensor": 2}, **distributed}, "load": sharded, "steps": 2},
        "pipeline-sharded": {"config": {"parallel": {"pipeline": 2}, **distributed}, "load": sharded, "steps": 2},
    }
    two = run_ranks(f"{PROGRAM}:train_cases", 2, {"cases": cases}, timeout_s=400)[0]
    two["one"] = train("one", {"config": distributed, "load": sharded, "steps": 2})
    for name in set(two) - {"save"}:
        for got, wanted in zip(two[name]["figures"], reference["figures"][2:], strict=True):
            assert got["loss"] == pytest.approx(wanted["loss"], abs=1e-6), name
            assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5), name
    assert two["data"]["checksums"][0] == two["save"]["checksums"][2]
    assert two["tensor"]["checksums"][0] == two["pipeline"]["checksums"][0] == reference["checksums"][2]


@pytest.mark.slow
def test_three_steps_under_tensor_parallelism_go_on_elsewhere(tmp_path: Path) -> None:
    """Saved at TP 2 with a distributed optimizer; continued at PP 2, DP 2 and TP 2 as if uninterrupted."""
    sharded, path = {"optimizer": {"distributed": True}}, str(tmp_path / "step")
    tensor = {"config": {"parallel": {"tensor": 2}, **sharded}}
    cases = {
        "straight": {**tensor, "steps": 6, "save_at": 3, "save": path},
        "pipeline": {"config": {"parallel": {"pipeline": 2}, **sharded}, "steps": 3, "load": path},
        "data": {"config": sharded, "steps": 3, "load": path},
        "tensor": {**tensor, "steps": 3, "load": path},
    }
    for results in run_ranks(f"{PROGRAM}:train_cases", 2, {"cases": cases}, timeout_s=400):
        straight = results.pop("straight")
        for name, resumed in results.items():
            assert resumed["checksums"][0] == straight["checksums"][3], name
            for got, wanted in zip(resumed["figures"], straight["figures"][3:], strict=True):
                assert got["loss"] == pytest.approx(wanted["loss"], abs=1e-6), name
                # ASymPO's loss is the same for any weights: these are not
                assert got["J"] == pytest.approx(wanted["J"], abs=1e-5), name
                assert got["entropy"] == pytest.approx(wanted["entropy"], abs=1e-5), name
                assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5), name


def test_padded_buckets_resume_bit_exactly(tmp_path: Path) -> None:
    """Tied embeddings over two stages have a bucket of their own, which is padded: what follows must not shift."""
    case: dict[str, Any] = {"config": {"parallel": {"pipeline": 2}, "optimizer": {"distributed": True}}}
    path = str(tmp_path / "step")
    cases = {
        "straight": {**case, "steps": 3, "save_at": 2, "save": path},
        "resumed": {**case, "steps": 1, "load": path},
    }
    for results in run_ranks(f"{PROGRAM}:train_cases", 2, {"cases": cases}, timeout_s=400):
        assert results["resumed"]["checksums"] == results["straight"]["checksums"][2:]
        assert results["resumed"]["figures"] == results["straight"]["figures"][2:]


@pytest.mark.parametrize("weights_only", [False, True])
def test_other_weights_than_were_saved(tmp_path: Path, one_rank: None, weights_only: bool) -> None:
    checkpoints, learner = _saved(tmp_path, 1)
    newest = checkpoints.newest()
    assert newest is not None
    marker = json.loads((newest / MARKER).read_text())
    assert marker["checksum"] == learner.checksum()
    (newest / MARKER).write_text(json.dumps({**marker, "checksum": "0" * 16}))
    with pytest.raises(CheckpointError, match=rf"checksum 0{{16}} and loaded with {learner.checksum()}: .*damaged"):
        learner.load(newest, weights_only=weights_only)


def _saved(tmp_path: Path, steps: int, keep_last: int = 9) -> tuple[Checkpoints, Learner]:
    _, _, learner = build({"config": SPLIT})
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last)
    for step in range(steps):
        rows = make_rows(step, 4)
        learner.step([rows], 4)
        checkpoints.save(learner)
    return checkpoints, learner


def test_partial_checkpoints_are_skipped(tmp_path: Path, one_rank: None, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints, _ = _saved(tmp_path, 3)
    (checkpoints.root / "step_000003" / MARKER).unlink()
    (checkpoints.root / "step_000009").mkdir()
    (checkpoints.root / "step_000010.tmp").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest() == checkpoints.root / "step_000002"
    assert "step_000009, step_000003 is incomplete and skipped; using step_000002" in caplog.text
    assert Checkpoints.find(tmp_path) == checkpoints.root / "step_000002"
    assert Checkpoints.find(checkpoints.root / "step_000001") == checkpoints.root / "step_000001"


def test_only_the_last_are_kept(tmp_path: Path, one_rank: None) -> None:
    checkpoints, learner = _saved(tmp_path, 4, keep_last=2)
    names = sorted(path.name for path in checkpoints.root.iterdir())
    assert names == ["step_000003", "step_000004"]
    before = (checkpoints.root / "step_000004" / MARKER).stat().st_mtime_ns
    assert checkpoints.save(learner) == 3  # saved already: nothing is written again
    assert (checkpoints.root / "step_000004" / MARKER).stat().st_mtime_ns == before


def test_cleaning_up_spares_the_save_of_a_replacement(tmp_path: Path, one_rank: None) -> None:
    """A trainer that was stopped after its rename wakes and prunes while another one writes the next checkpoint."""
    checkpoints, learner = _saved(tmp_path, 3, keep_last=2)
    saving = checkpoints.root / "step_000005.0123abcd.tmp"
    saving.mkdir()
    checkpoints.save(learner)  # saved already: nothing but the clean-up
    assert sorted(path.name for path in checkpoints.root.iterdir()) == ["step_000002", "step_000003", saving.name]
    learner.step([make_rows(3, 4)], 4)
    checkpoints.save(learner)
    assert not saving.exists(), "leftovers go before the next save"


def test_nothing_there(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 2).newest() is None
    with pytest.raises(CheckpointError, match=r"does not exist\. Check model.init"):
        Checkpoints.find(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        Checkpoints.find(tmp_path)


@contextmanager
def _files_up_to(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes fail in this process and its children, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 20_000])
def test_full_disk_leaves_nothing_half_written(tmp_path: Path, one_rank: None, size: int) -> None:
    checkpoints, learner = _saved(tmp_path, 1)
    rows = make_rows(1, 4)
    learner.step([rows], 4)
    before = learner.checksum()
    with _files_up_to(size), pytest.raises(CheckpointError, match="step_000002 could not be written"):
        checkpoints.save(learner)
    assert [path.name for path in checkpoints.root.iterdir()] == ["step_000001"]
    assert checkpoints.newest() == checkpoints.root / "step_000001"
    assert learner.checksum() == before
    checkpoints.save(learner)  # and once there is room again it works
    assert checkpoints.newest() == checkpoints.root / "step_000002"


@pytest.mark.slow
def test_one_rank_that_fails_to_save_does_not_wait_for_the_others(tmp_path: Path) -> None:
    """The first rank ends at once; the other, inside dist_checkpointing, then loses its peer instead of hanging."""
    first, second = run_ranks(f"{PROGRAM}:failing_save", 2, {"save": str(tmp_path / "step")}, timeout_s=400)
    assert re.search("^CheckpointError: .*step could not be written: OSError: .*Disk quota exceeded", first)
    assert re.search("^CheckpointError: .*step could not be written: .*[Cc]onnection", second)
    assert not (tmp_path / "step").exists()


def test_lack_of_space_is_seen_beforehand(tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, learner = _saved(tmp_path, 0)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10_000))
    with pytest.raises(CheckpointError, match=r"step_000000 needs about 0\.\d MiB and 0.0 MiB are free"):
        checkpoints.save(learner)
    assert list(checkpoints.root.iterdir()) == []


def test_refusals(tmp_path: Path, one_rank: None) -> None:
    checkpoints, learner = _saved(tmp_path, 1)
    newest = checkpoints.newest()
    assert newest is not None
    with pytest.raises(CheckpointError, match="exists already; a checkpoint is never overwritten"):
        learner.save(newest)
    with pytest.raises(CheckpointError, match=r"checkpoint .*gone does not exist"):
        learner.load(tmp_path / "gone")
    marker = json.loads((newest / MARKER).read_text())
    _, _, other = build({"hf": {"intermediate_size": 64}})
    with pytest.raises(CheckpointError, match="model with ffn_size=48, this run has ffn_size=64"):
        other.load(newest)
    (newest / MARKER).write_text(json.dumps({**marker, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, expected 2"):
        other.load(newest)


def test_another_kind_of_optimizer(tmp_path: Path, one_rank: None) -> None:
    """Its state cannot be read, its weights can."""
    checkpoints, saved = _saved(tmp_path, 1)
    newest, checksum = checkpoints.newest(), saved.checksum()
    assert newest is not None
    _, _, learner = build({"config": {"optimizer": {"distributed": True}}})
    with pytest.raises(CheckpointError, match=r"optimizer.distributed=false, this run has true\. .*; model.init="):
        learner.load(newest)
    learner.load(newest, weights_only=True)
    assert learner.checksum() == checksum


def test_one_rank_reads_the_marker_for_all(tmp_path: Path) -> None:
    for seen in run_ranks(f"{PROGRAM}:markers", 2, {"save": str(tmp_path / "step")}, timeout_s=400):
        assert seen[0] == "loaded"
        assert seen[1].endswith("step-gone does not exist.")


def test_random_state_travels(tmp_path: Path, one_rank: None) -> None:
    checkpoints, learner = _saved(tmp_path, 1)
    wanted = torch.rand(3)
    newest = checkpoints.newest()
    assert newest is not None
    learner.load(newest)
    assert torch.equal(torch.rand(3), wanted)
