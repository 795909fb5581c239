"""Experts over ranks: the gradient of every parameter is that of one rank, load-balancing loss included.

The balance of a micro-batch is a statistic of its tokens, so with a coefficient above 0 the gradient depends on which
responses share a micro-batch, and on nothing else: layouts are compared on the same micro-batches.
"""

from pathlib import Path
from typing import Any

import pytest
from moe_programs import PROGRAM, ROUTER, gradients
from safetensors.torch import load_file

from asympo_megatron.testing.gradients import relative_errors
from asympo_megatron.testing.megatron import run_ranks

COEFFICIENT = 0.05

TOLERANCE = 2e-5


def _parallel(coefficient: float, distributed: bool = False, **sizes: Any) -> dict[str, Any]:
    config = {"parallel": sizes, "optimizer": {"distributed": distributed}}
    return {"config": config, "coefficient": coefficient}


TENSOR = {"tensor": 2, "sequence": True}

TWO_RANKS = {
    "expert": _parallel(COEFFICIENT, expert=2),
    "expert-whole-matrices-tensor": _parallel(COEFFICIENT, expert=2, expert_tensor=1, **TENSOR),
}
MUTANTS = ("Megatron's own scale", "padding counted", "tokens of this rank only")
SLOW_TWO_RANKS = {
    "expert-no-loss": _parallel(0.0, expert=2),
    "expert-context": _parallel(COEFFICIENT, expert=2, context=2),
    "data": _parallel(COEFFICIENT),
    "context": _parallel(COEFFICIENT, context=2),
    "pipeline": _parallel(COEFFICIENT, pipeline=2),
    "tensor": _parallel(COEFFICIENT, **TENSOR),
    "tensor-no-loss": _parallel(0.0, **TENSOR),
    "expert-distributed-optimizer": _parallel(COEFFICIENT, distributed=True, expert=2),
}
FOUR_RANKS = {
    "expert-data": _parallel(COEFFICIENT, expert=2),
    "expert-data-distributed-optimizer": _parallel(COEFFICIENT, distributed=True, expert=2),
    "expert-4": _parallel(COEFFICIENT, expert=4),
    "expert-pipeline": _parallel(COEFFICIENT, expert=2, pipeline=2),
    "expert-virtual-pipeline": _parallel(COEFFICIENT, expert=2, pipeline=2, virtual_pipeline=2),
    "expert-tensor": _parallel(COEFFICIENT, expert=2, **TENSOR),
    "expert-whole-matrices-tensor-data": _parallel(COEFFICIENT, expert=2, expert_tensor=1, **TENSOR),
    "expert-pipeline-tensor": _parallel(COEFFICIENT, expert=2, expert_tensor=1, pipeline=2, **TENSOR),
}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[float, dict[str, str]]:
    """Coefficient -> what a case is compared with: the gradients of one rank."""
    folder = tmp_path_factory.mktemp("gradients")
    files = {}
    for coefficient in (0.0, COEFFICIENT):
        file = str(folder / f"{coefficient}.safetensors")
        gradients("one rank", {"coefficient": coefficient, "keep": file})
        files[coefficient] = {"wanted": file}
    return files


def _run(world_size: int, cases: dict[str, Any], wanted: dict[float, dict[str, str]]) -> list[dict[str, Any]]:
    payload = {name: {**case, **wanted[case["coefficient"]]} for name, case in cases.items()}
    return run_ranks(f"{PROGRAM}:gradient_cases", world_size, {"cases": payload}, timeout_s=400)


@pytest.fixture(scope="module")
def two_ranks(wanted: dict[float, dict[str, str]]) -> list[dict[str, Any]]:
    broken = {name: {**TWO_RANKS["expert-whole-matrices-tensor"], "mutant": name} for name in MUTANTS}
    return _run(2, {**TWO_RANKS, **broken}, wanted)


@pytest.fixture(scope="module")
def slow_two_ranks(wanted: dict[float, dict[str, str]]) -> list[dict[str, Any]]:
    return _run(2, SLOW_TWO_RANKS, wanted)


@pytest.fixture(scope="module")
def four_ranks(wanted: dict[float, dict[str, str]]) -> list[dict[str, Any]]:
    return _run(4, FOUR_RANKS, wanted)


def _check(ranks: list[dict[str, Any]], case: str, wanted: dict[float, dict[str, str]]) -> None:
    assert all(rank[case]["figures"] == ranks[0][case]["figures"] for rank in ranks), "ranks report different figures"
    errors = [error for rank in ranks for error in rank[case]["errors"].items()]
    assert {name for name, _ in errors} == set(load_file(wanted[0.0]["wanted"])), "no rank has this parameter"
    name, worst = max(errors, key=lambda error: error[1])
    assert worst <= TOLERANCE, name


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks_have_the_gradient_of_one(
    two_ranks: list[dict[str, Any]], wanted: dict[float, dict[str, str]], case: str
) -> None:
    _check(two_ranks, case, wanted)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_noticed(two_ranks: list[dict[str, Any]], mutant: str) -> None:
    assert max(rank[mutant]["errors"][ROUTER] for rank in two_ranks) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_TWO_RANKS)
def test_other_layouts_of_two_ranks(
    slow_two_ranks: list[dict[str, Any]], wanted: dict[float, dict[str, str]], case: str
) -> None:
    _check(slow_two_ranks, case, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR_RANKS)
def test_four_ranks_have_the_gradient_of_one(
    four_ranks: list[dict[str, Any]], wanted: dict[float, dict[str, str]], case: str
) -> None:
    _check(four_ranks, case, wanted)


def _compare(tmp_path: Path, case: dict[str, Any], file: str) -> dict[str, float]:
    own = str(tmp_path / "own.safetensors")
    gradients("one rank", {**case, "keep": own})
    return relative_errors(load_file(own), load_file(file))


def test_partition_into_microbatches(one_rank: None, wanted: dict[float, dict[str, str]], tmp_path: Path) -> None:
    """Coefficient 0: no matter. Above 0: the balance of other micro-batches is another one, as it is defined."""
    free = _compare(tmp_path, {"coefficient": 0.0, "microbatches": 2}, wanted[0.0]["wanted"])
    assert max(free.values()) <= TOLERANCE
    balanced = _compare(tmp_path, {"coefficient": COEFFICIENT, "microbatches": 2}, wanted[COEFFICIENT]["wanted"])
    assert balanced[ROUTER] > 100 * TOLERANCE


@pytest.mark.parametrize("options", [{"coefficient": COEFFICIENT}, {"megatron": {"moe_z_loss_coeff": 0.1}}])
def test_scale_knows_neither_microbatch_count_nor_size(one_rank: None, tmp_path: Path, options: dict[str, Any]) -> None:
    """Every micro-batch twice is the same mean."""
    once = str(tmp_path / "once.safetensors")
    gradients("one rank", {**options, "keep": once})
    assert max(_compare(tmp_path, {**options, "repeat": 2}, once).values()) <= TOLERANCE
