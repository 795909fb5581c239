"""Every layout is a way to compute one and the same update: figures, gradient norms and initial weights agree.

ASymPO's loss is the mean advantage whatever the weights are, so it says nothing about them: J, the NLLs and the
gradient norms of all steps are compared, and in two layouts REINFORCE too, whose loss is a function of the weights.
"""

from typing import Any

import pytest
from rank_programs import PROGRAM, make_rows, train

from asympo_megatron.testing.megatron import run_ranks


def _parallel(**sizes: Any) -> dict[str, Any]:
    return {"config": {"parallel": sizes}}


def _distributed(**sizes: Any) -> dict[str, Any]:
    return {"config": {"parallel": sizes, "optimizer": {"distributed": True}}}


def _reinforce(**sizes: Any) -> dict[str, Any]:
    return {"objective": "reinforce", **_parallel(**sizes)}


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
    "tensor-reinforce": _reinforce(tensor=2),
    "pipeline-reinforce": _reinforce(pipeline=2),
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


COMPARED = ("J", "nll_pos", "nll_neg", "entropy", "grad_norm")


def _differences(got: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Largest difference over all steps, relative to the wanted figure; of the first gradient norm on its own."""
    pairs = list(zip(got["figures"], wanted["figures"], strict=True))

    def apart(name: str, a: dict[str, float], b: dict[str, float]) -> float:
        return abs(a[name] - b[name]) / abs(b[name])

    largest = {name: max(apart(name, a, b) for a, b in pairs) for name in COMPARED}
    return {**largest, "first_grad_norm": apart("grad_norm", *pairs[0])}


def _check(ranks: list[dict[str, Any]], case: str, wanted: dict[str, Any]) -> None:
    got = ranks[0][case]
    assert all(rank[case] == got for rank in ranks), "ranks report different figures"
    assert got["checksums"][0] == wanted["checksums"][0], "initial weights depend on the layout"
    differences = _differences(got, wanted)
    assert differences.pop("first_grad_norm") < 1e-6
    for name, difference in differences.items():
        assert difference < 2e-6, name
    for name in ("loss", "tokens", "input_tokens", "responses"):
        for a, b in zip(got["figures"], wanted["figures"], strict=True):
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), name


@pytest.fixture(scope="module")
def reinforce() -> dict[str, Any]:
    return train("reference", {"objective": "reinforce"})


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks_reproduce_one(
    two_ranks: list[dict[str, Any]], reference: dict[str, Any], reinforce: dict[str, Any], case: str
) -> None:
    _check(two_ranks, case, reinforce if case.endswith("reinforce") else reference)


def test_only_the_loss_of_reinforce_depends_on_the_weights(
    reference: dict[str, Any], reinforce: dict[str, Any]
) -> None:
    """Why the loss of ASymPO is not enough: it is the sum of the advantages over N, in any layout and any model."""
    for step, (asympo, naive) in enumerate(zip(reference["figures"], reinforce["figures"], strict=True)):
        rows = make_rows(step)
        mean = sum(row.advantage for row in rows if any(row.mask)) / len(rows)
        assert asympo["loss"] == pytest.approx(mean, abs=1e-6)
        assert abs(naive["loss"] - mean) > 0.01


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_noticed(two_ranks: list[dict[str, Any]], reference: dict[str, Any], mutant: str) -> None:
    first, wanted = two_ranks[0][mutant]["figures"][0], reference["figures"][0]
    assert abs(first["grad_norm"] / wanted["grad_norm"] - 1) > 1e-4  # a hundred times the tolerance of the true layouts


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(FOUR_RANKS) - {"tensor-4-heads"}))
def test_four_ranks_reproduce_one(four_ranks: list[dict[str, Any]], reference: dict[str, Any], case: str) -> None:
    _check(four_ranks, case, reference)


@pytest.mark.slow
def test_four_way_tensor_parallelism(four_ranks: list[dict[str, Any]]) -> None:
    _check(four_ranks, "tensor-4-heads", train("reference", {"hf": {"num_key_value_heads": 4}}))
