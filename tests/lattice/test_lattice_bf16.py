"""bf16: a layout's gradient is as near to fp32 as the gradient of a single bf16 rank is.

The reference starts from weights that bf16 can hold, so that the error is that of the arithmetic alone.
"""

import math
from pathlib import Path

import pytest
from lattice_cells import ONE_RANK, Cell
from lattice_run import Outcome, measure

SLACK = 1.25
"""Rounding differs from layout to layout: TP2 splits sums that one rank rounds once. A lost or doubled term is
nowhere near a quarter of the rounding error."""

LAYOUTS = ("DP2+distopt", "TP2+SP", "PP2xVPP2", "CP2", "TP2xPP2+SP", "TP2xCP2+SP", "PP2xCP2")
CASES = [(layout, model) for layout in LAYOUTS for model in ("qwen3-tied", "qwen2-untied")]


def _cell(layout: str, model: str) -> Cell:
    return Cell(layout, 2, "packed", "asympo", model, "bf16")


def _mean_square(outcome: Outcome) -> float:
    return math.sqrt(sum(error**2 for error in outcome.errors.values()) / len(outcome.errors))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Outcome]:
    folder: Path = tmp_path_factory.mktemp("references")
    cells = [_cell(layout, model) for layout, model in CASES]
    cells += [_cell(ONE_RANK, model) for _, model in CASES[:2]]
    measured: dict[Cell, Outcome] = {}
    for ranks in (1, 2, 4):
        some = [cell for cell in cells if cell.ranks == ranks]
        measured |= {outcome.cell: outcome for outcome in measure(some, folder)}
    return measured


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("layout", "model"), CASES)
def test_bf16_error_is_no_worse_than_on_one_rank(outcomes: dict[Cell, Outcome], layout: str, model: str) -> None:
    got, single = outcomes[_cell(layout, model)], outcomes[_cell(ONE_RANK, model)]
    assert 1e-4 < _mean_square(single) < 0.1
    assert _mean_square(got) <= SLACK * _mean_square(single)
    assert got.gradient <= 2 * single.gradient, got.parameter
