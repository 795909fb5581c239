"""Scores, and a step that uses all of them, are the same in every layout: real ranks against one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scoring_programs import PROGRAM, score_and_step

from asympo_megatron.testing.gradients import relative_errors
from asympo_megatron.testing.megatron import run_ranks


def _parallel(**sizes: Any) -> dict[str, Any]:
    return {"config": {"parallel": sizes}}


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

TWO_RANKS = {
    "tensor-sequence": _parallel(tensor=2, sequence=True),
    "pipeline": _parallel(pipeline=2),
    "virtual-pipeline": _parallel(pipeline=2, virtual_pipeline=2),
    "context": _parallel(context=2),
    "data": _parallel(),
    "data-overlap": {"config": {"optimizer": {"distributed": True}, "ddp": {"megatron": OVERLAP}}},
}

MUTANTS = {
    "zigzag left": {**_parallel(context=2), "mutant": "zigzag left"},
    "own micro-batch": {**_parallel(), "mutant": "own micro-batch"},
}

FOUR_RANKS = {
    "tensor-pipeline": _parallel(tensor=2, pipeline=2),
    "tensor-context-sequence": _parallel(tensor=2, context=2, sequence=True),
    "pipeline-context": _parallel(pipeline=2, context=2),
    "data-context": {**_parallel(context=2), "estimator": "k1"},
    "tensor-data": {**_parallel(tensor=2), "estimator": "k2"},
}


def _run(cases: dict[str, Any], ranks: int, folder: Path) -> list[dict[str, Any]]:
    cases = {name: {**case, "folder": str(folder)} for name, case in cases.items()}
    results = run_ranks(f"{PROGRAM}:score_cases", ranks, {"cases": cases}, timeout_s=240)
    for name in cases:
        for rank, result in enumerate(results):
            result[name]["gradients"] = torch.load(folder / f"{name}.{rank}.pt")
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _run({**TWO_RANKS, **MUTANTS}, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _run(FOUR_RANKS, 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def one_rank_results() -> dict[str, Any]:
    """By estimator: one rank, one micro-batch."""
    wide = {"batch": {"max_tokens_per_microbatch": 2048}}
    return {
        estimator: score_and_step("one", {"config": wide, "estimator": estimator}) for estimator in ("k1", "k2", "k3")
    }


def _check(ranks: list[dict[str, Any]], name: str, wanted: dict[str, Any]) -> None:
    results = [rank[name] for rank in ranks]
    _check_scores(results, wanted)
    for result in results:
        assert result["figures"] == results[0]["figures"], "ranks report different figures"
        assert result["checksums"][0] == result["checksums"][1] == wanted["checksums"][0]
        for parameter, error in relative_errors(result["gradients"], wanted["gradients"]).items():
            assert error < 2e-5, parameter
    for got, want in zip(results[0]["figures"], wanted["figures"], strict=True):
        for figure in ("reference_kl", "loss", "grad_norm", "clip_fraction", "ratio_kl"):
            assert got[figure] == pytest.approx(want[figure], rel=2e-5, abs=1e-7), figure


def _check_scores(results: list[dict[str, Any]], wanted: dict[str, Any], steps: str = "01") -> None:
    """Every row is scored on every rank of its replica, and only there, as it is on one rank; rows are STEP.NUMBER."""
    assert {row for result in results for row in result["logprobs"]} == set(wanted["logprobs"])
    for result in results:
        for row, pair in result["logprobs"].items():
            if row[0] in steps:
                for got, want in zip(pair, wanted["logprobs"][row], strict=True):
                    assert got == pytest.approx(want, rel=1e-5, abs=1e-5), row


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_reproduce_one(two_ranks: Any, one_rank_results: Any, name: str) -> None:
    _check(two_ranks, name, one_rank_results["k3"])


def test_the_case_reaches_what_it_is_for(one_rank_results: Any) -> None:
    for result in one_rank_results.values():
        for figures in result["figures"]:
            assert 0.05 < figures["clip_fraction"] < 0.95
            assert figures["reference_kl"] != 0
    assert len(one_rank_results["k3"]["logprobs"]) == 32


def test_mutant_zigzag_left(two_ranks: Any, one_rank_results: Any) -> None:
    with pytest.raises(AssertionError):
        _check_scores([rank["zigzag left"] for rank in two_ranks], one_rank_results["k3"])


def test_mutant_statistic_of_one_micro_batch(two_ranks: Any, one_rank_results: Any) -> None:
    """What it trains on is right; what it leaves out, and so the gradient, is not."""
    wanted = one_rank_results["k3"]
    _check_scores([rank["own micro-batch"] for rank in two_ranks], wanted, steps="0")
    got = two_ranks[0]["own micro-batch"]
    assert got["figures"][0]["clip_fraction"] != pytest.approx(wanted["figures"][0]["clip_fraction"], rel=1e-2)
    assert max(relative_errors(got["gradients"], wanted["gradients"]).values()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_reproduce_one(four_ranks: Any, one_rank_results: Any, name: str) -> None:
    _check(four_ranks, name, one_rank_results[FOUR_RANKS[name].get("estimator", "k3")])
