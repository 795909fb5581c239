"""Every layout is a way to compute one and the same update: losses, gradient norms and initial weights agree."""

from typing import Any

import pytest
from rank_programs import PROGRAM, train

from asympo_megatron.testing.megatron import run_ranks


def _parallel(**sizes: Any) -> dict[str, Any]:
    return {"config": {"parallel": sizes}}


def _distributed(**sizes: Any) -> dict[str, Any]:
    return {"config": {"parallel": sizes, "optimizer": {"distributed": True}}}


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

TWO_RANKS = {
    "tensor": _parallel(tensor=2),
    "tensor-sequence": _parallel(tensor=2, sequence=True),
    "pipeline": _parallel(pipeline=2),
    "virtual-pipeline": _parallel(pipeline=2, virtual_pipeline=2),
    "context": _parallel(context=2),
    "data": _parallel(),
    "data-distributed-optimizer": _distributed(),
    "data-overlap": {"config": {"optimizer": {"distributed": True}, "ddp": {"megatron": OVERLAP}}},
}

MUTANTS = {
    "local sums instead of sums over context parallelism": {**_parallel(context=2), "mutant": "local_sums"},
    "gradients of norms not summed under sequence parallelism": {
        **_parallel(tensor=2, sequence=True),
        "mutant": "no_sequence_allreduce",
    },
}

FOUR_RANKS = {
    "tensor-pipeline": _parallel(tensor=2, pipeline=2),
    "tensor-pipeline-sequence": _parallel(tensor=2, pipeline=2, sequence=True),
    "tensor-context-sequence": _parallel(tensor=2, context=2, sequence=True),
    "pipeline-context": _parallel(pipeline=2, context=2),
    "tensor-data-distributed-optimizer": _distributed(tensor=2),
    "tensor-virtual-pipeline": _parallel(tensor=2, pipeline=2, virtual_pipeline=2),
    "tensor-4-heads": {"config": {"parallel": {"tensor": 4}}, "hf": {"num_key_value_heads": 4}},
}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(f"{PROGRAM}:train_cases", 2, {"cases": {**TWO_RANKS, **MUTANTS}}, timeout_s=240)


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[str, Any]]:
    return run_ranks(f"{PROGRAM}:train_cases", 4, {"cases": FOUR_RANKS}, timeout_s=400)


def _differences(got: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, float]:
    """Largest |loss| difference over all steps, and relative difference of the first gradient norm."""
    pairs = list(zip(got["figures"], wanted["figures"], strict=True))
    loss = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    first, first_wanted = pairs[0]
    return loss, abs(first["grad_norm"] - first_wanted["grad_norm"]) / first_wanted["grad_norm"]


def _check(ranks: list[dict[str, Any]], case: str, wanted: dict[str, Any]) -> None:
    got = ranks[0][case]
    assert all(rank[case] == got for rank in ranks), "ranks report different figures"
    assert got["checksums"][0] == wanted["checksums"][0], "initial weights depend on the layout"
    loss, grad_norm = _differences(got, wanted)
    assert loss < 1e-6
    assert grad_norm < 1e-6
    for name in ("J", "nll_pos", "nll_neg", "entropy", "tokens", "input_tokens", "responses"):
        for a, b in zip(got["figures"], wanted["figures"], strict=True):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks_reproduce_one(two_ranks: list[dict[str, Any]], reference: dict[str, Any], case: str) -> None:
    _check(two_ranks, case, reference)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_noticed(two_ranks: list[dict[str, Any]], reference: dict[str, Any], mutant: str) -> None:
    _, grad_norm = _differences(two_ranks[0][mutant], reference)
    assert grad_norm > 1e-4  # a hundred times the tolerance of the true layouts


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(FOUR_RANKS) - {"tensor-4-heads"}))
def test_four_ranks_reproduce_one(four_ranks: list[dict[str, Any]], reference: dict[str, Any], case: str) -> None:
    _check(four_ranks, case, reference)


@pytest.mark.slow
def test_four_way_tensor_parallelism(four_ranks: list[dict[str, Any]]) -> None:
    _check(four_ranks, "tensor-4-heads", train("reference", {"hf": {"num_key_value_heads": 4}}))
