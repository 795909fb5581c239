"""A few steps on one GPU through NCCL: bf16, fused optimizers, Transformer Engine, packing. Never run yet: no GPU was
at hand. Several GPUs also run the layouts of two ranks."""

from typing import Any

import pytest
import torch
from rank_programs import PROGRAM, build, make_rows, microbatches

from asympo_megatron.mcore import Row, shutdown
from asympo_megatron.mcore.spec import uses_transformer_engine
from asympo_megatron.testing.megatron import run_ranks

pytestmark = pytest.mark.gpu

BF16: dict[str, Any] = {"model": {"dtype": "bf16"}}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SINGLE_DEVICE = {
    "float32": {},
    "bf16": BF16,
    "bf16, distributed optimizer": {**BF16, "optimizer": {"distributed": True}},
    "bf16, overlaps": {**BF16, "optimizer": {"distributed": True}, "ddp": {"megatron": OVERLAP}},
    "bf16, full recompute": {
        "model": {
            "dtype": "bf16",
            "megatron": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        }
    },
}


def steps(case: dict[str, Any], count: int = 3) -> list[dict[str, float]]:
    config, layout, learner = build(case)
    assert layout.device.type == "cuda"
    figures = []
    for _ in range(count):
        rows = make_rows(learner.step_count)
        figures.append(learner.step(microbatches(rows, config, layout), len(rows)))
    return figures


@pytest.mark.parametrize("name", SINGLE_DEVICE)
def test_steps_agree_with_float32(name):
    want = steps({})
    shutdown()
    got = steps({"config": SINGLE_DEVICE[name]})
    for ours, theirs in zip(got, want, strict=True):
        assert ours["nll_pos"] == pytest.approx(theirs["nll_pos"], rel=0.02)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)


def test_packed_sequences_score_as_alone():
    """One micro-batch of several sequences against one micro-batch each: thd attention and positions."""
    rows = [Row([1, 2, 3], [4, 5], [1, 1], 0.5), Row([6] * 9, [7], [1], -0.5), Row([8], [9, 10, 11], [1] * 3, 1.0)]
    _, _, learner = build({"config": BF16})
    pack = learner.step([rows], len(rows))
    shutdown()
    _, _, learner = build({"config": BF16})
    alone = learner.step([[row] for row in rows], len(rows))
    for figure in ("nll_pos", "nll_neg", "entropy"):
        assert pack[figure] == pytest.approx(alone[figure], rel=0.01)
    assert pack["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.05)


def test_transformer_engine_layers_are_used():
    if not uses_transformer_engine():
        pytest.skip("transformer_engine is not installed here; install asympo-megatron[te]")
    _, _, learner = build({"config": BF16})
    kinds = {type(module).__name__ for module in learner.chunks[0].modules()}
    assert {"TEDotProductAttention", "TELayerNormColumnParallelLinear"} <= kinds


def test_the_optimizer_is_a_fused_one():
    """Megatron takes Transformer Engine's or Apex's FusedAdam where one is installed, else torch's AdamW."""
    fused = pytest.importorskip("megatron.core.optimizer", reason="megatron-core has no optimizer module")
    if fused.Adam.__module__.startswith("torch."):
        pytest.skip("neither Transformer Engine nor Apex is installed, so there is no fused Adam to test")
    config, layout, learner = build({"config": BF16})
    rows = make_rows(0)
    before = learner.checksum()
    learner.step(microbatches(rows, config, layout), len(rows))
    assert learner.checksum() != before
    assert isinstance(learner.optimizer.chained_optimizers[0].optimizer, fused.Adam)


@pytest.mark.parametrize("sizes", [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}, {}])
def test_two_devices_agree_with_one(sizes):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device; NCCL needs one for each rank")
    want = steps({"config": BF16})
    got = run_ranks(
        f"{PROGRAM}:train_cases", 2, {"cases": {"two": {"config": {**BF16, "parallel": sizes}, "steps": 3}}}
    )
    for ours, theirs in zip(got[0]["two"]["figures"], want, strict=True):
        assert ours["nll_pos"] == pytest.approx(theirs["nll_pos"], rel=0.01)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
