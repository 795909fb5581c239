"""The output layer inside Megatron's model: weight gradients in main_grad, hooks, collectives, and no [T, V]."""

from typing import Any

import pytest
import torch
from output_layer_ranks import PROGRAM, SMALL_TILE_BYTES, spied_step
from rank_programs import PROGRAM as TRAINING
from rank_programs import build, make_rows, microbatches, train

from asympo_megatron.mcore.collate import collate
from asympo_megatron.mcore.model import policy_models
from asympo_megatron.parallel import logit_tiles, main_grad
from asympo_megatron.testing.megatron import run_ranks

UNTIED = {"tie_word_embeddings": False}


def case(hf: dict[str, Any] | None = None, ddp: dict[str, Any] | None = None, **parallel: Any) -> dict[str, Any]:
    config = {"parallel": parallel, "ddp": {"megatron": ddp or {}}, "optimizer": {"distributed": bool(ddp)}}
    return {"config": config, "hf": hf or {}}


def buffers(hf: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradient buffers after two micro-batches on one rank."""
    config, layout, learner = build({"hf": hf})
    batches = [collate(rows, layout) for rows in microbatches(make_rows(0), config, layout)[:2]]
    assert len(batches) == 2
    learner._forward_backward(batches)
    return {name: p.main_grad.clone() for name, p in learner.chunks[0].named_parameters()}


@pytest.mark.parametrize("hf", [{}, UNTIED], ids=["tied", "own weight"])
def test_the_buffers_hold_what_autograd_would_bring(one_rank, monkeypatch, hf):
    got = buffers(hf)
    monkeypatch.setattr(main_grad, "buffer_of", lambda _: None)
    want = buffers(hf)
    assert got.keys() == want.keys()
    for name in want:
        assert float((got[name] - want[name]).norm()) <= 2e-6 * float(want[name].norm()), name


@pytest.mark.parametrize("hf", [{}, UNTIED], ids=["tied", "own weight"])
def test_mutant_that_counts_the_weight_twice(one_rank, monkeypatch, hf):
    want = buffers(hf)
    original = logit_tiles.LogitTiles.row_parts
    monkeypatch.setattr(logit_tiles.LogitTiles, "row_parts", lambda *words: [*original(*words)] * 2)
    got = buffers(hf)
    name = next(name for name in want if name.endswith("output_layer.weight" if hf else "word_embeddings.weight"))
    assert float((got[name] - want[name]).norm()) > 0.1 * float(want[name].norm())


def test_the_weight_is_read_inside_forward_only(one_rank):
    """As if it were gathered by a hook before forward and released after: outside it is NaN."""
    _, _, learner = build({"hf": UNTIED})
    layer = next(policy_models(learner.chunks)).output_layer
    good = layer.weight.detach().clone()
    calls: list[str] = []

    def gather(*_: Any) -> None:
        layer.weight.data.copy_(good)
        calls.append("gather")

    def release(*_: Any) -> None:
        layer.weight.data.fill_(torch.nan)
        calls.append("release")

    hooks = [layer.register_forward_pre_hook(gather), layer.register_forward_hook(release)]
    config, layout = learner.config, learner.layout
    batch = collate(microbatches(make_rows(0), config, layout)[0], layout)
    output, _ = learner._forward_step(iter([batch]), learner.chunks[0])
    assert output.isfinite().all()
    assert output.shape == (2, batch.targets.numel())
    assert calls == ["gather", "release"] * 2  # GPTModel's call, and the one with the targets
    for hook in hooks:
        hook.remove()


def test_a_step_never_makes_tokens_by_vocabulary(one_rank, monkeypatch):
    assert spied_step({}) > 0  # the default tile is larger than these logits: the spy sees them
    monkeypatch.setattr(logit_tiles, "CPU_TILE_BYTES", SMALL_TILE_BYTES)
    assert spied_step({}) == 0


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    cases = {
        "tensor": {**case(UNTIED, tensor=2), "spy": "layer"},
        "sequence": {**case(UNTIED, tensor=2, sequence=True), "spy": "layer"},
        "pipeline": {**case(pipeline=2), "spy": "step"},
        "pipeline small tile": {**case(pipeline=2), "spy": "step", "small_tile": True},
    }
    return run_ranks(f"{PROGRAM}:spies", 2, {"cases": cases}, timeout_s=240)


def test_collectives_of_a_micro_batch(ranks):
    for rank in ranks:
        assert rank["tensor"]["forward"] == ["allreduce_"] * 2  # statistics of the softmax
        assert rank["tensor"]["backward"] == ["allreduce_"]  # the hidden gradient, replicated
        assert rank["sequence"]["forward"] == ["_allgather_base_", *["allreduce_"] * 2]
        assert rank["sequence"]["backward"] == ["_reduce_scatter_base_"]


def test_only_the_last_stage_has_logits_and_only_in_tiles(ranks):
    first, last = ranks
    assert (first["pipeline"], first["pipeline small tile"]) == (0, 0)
    assert last["pipeline"] > 0
    assert last["pipeline small tile"] == 0


@pytest.mark.slow
def test_overlapped_reductions_and_split_weights_train_alike():
    """Own weight and tied ones, over layouts whose hooks and shared embeddings depend on the buffer's conventions."""
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    cases = {
        "own weight, overlap": case(UNTIED, overlap),
        "own weight, sequence": case(UNTIED, tensor=2, sequence=True),
        "own weight, pipeline": case(UNTIED, pipeline=2),
        "tied, pipeline, overlap": case({}, {"overlap_grad_reduce": True}, pipeline=2),
    }
    got = run_ranks(f"{TRAINING}:train_cases", 2, {"cases": {n: {**c, "steps": 3} for n, c in cases.items()}})
    want = {tied: train("alone", {"hf": {} if tied else UNTIED, "steps": 3}) for tied in (True, False)}
    for name in cases:
        alone = want[name.startswith("tied")]
        assert got[0][name]["checksums"][0] == alone["checksums"][0], name
        for figure in ("J", "nll_pos", "grad_norm"):
            for ours, theirs in zip(got[0][name]["figures"], alone["figures"], strict=True):
                assert ours[figure] == pytest.approx(theirs[figure], rel=2e-6), (name, figure)
