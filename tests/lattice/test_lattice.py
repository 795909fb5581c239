"""The same global batch gives the same gradient in every layout, micro-batching and packing.

The fast suite visits every layout of two ranks once; `make lattice` visits every cell and prints the table.
"""

from typing import Any

import pytest
from lattice_cells import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    MICROBATCHES,
    ONE_KV_HEAD,
    PACKINGS,
    Cell,
    all_cells,
    covering,
    full_product,
    pairwise,
)

GRADIENT_GOAL = 2e-5
FIGURE_GOAL = 2e-5

_TWO = [layout for layout, shape in LAYOUTS.items() if shape.ranks == 2]
FAST = (
    *(Cell(name, MICROBATCHES[i % 3], PACKINGS[i % 2], "asympo") for i, name in enumerate(_TWO)),
    *(Cell(name, 2, "packed", "reinforce", "qwen2-untied") for name in ("TP2+SP", "PP2")),
    Cell("TP2", 2, "packed", "asympo", ONE_KV_HEAD),
)
CELLS = dict.fromkeys([*FAST, *all_cells()])
SLOW = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=str(cell), marks=[] if cell in FAST else SLOW) for cell in CELLS]
)
def test_cell_reproduces_one_rank(lattice: Any, cell: Cell) -> None:
    outcome = lattice[cell]
    assert outcome.gradient <= GRADIENT_GOAL, outcome.parameter
    assert outcome.loss <= FIGURE_GOAL
    assert outcome.norm <= FIGURE_GOAL
    assert outcome.figures <= FIGURE_GOAL


def test_the_product_is_full_and_the_covering_meets_every_pair() -> None:
    layouts = {*LAYOUTS, *EXPERT_LAYOUTS}
    assert len(set(full_product())) == len(layouts) * len(MICROBATCHES) * len(PACKINGS)
    for names in ([name for name in LAYOUTS if "overlap" not in name], EXPERT_LAYOUTS):
        cells = [cell for cell in covering() if cell.layout in names]
        rows = [(c.layout, c.microbatches, c.packing, c.objective, c.model) for c in cells]
        axes = [{row[k] for row in rows} for k in range(5)]
        assert axes[0] == set(names)
        for a in range(5):
            for b in range(a):
                assert len({(row[a], row[b]) for row in rows}) == len(axes[a]) * len(axes[b])


def test_pairwise_rows_are_few() -> None:
    """Four axes of three values need nine rows at the least; all combinations would be 81."""
    rows = pairwise([["a", "b", "c"]] * 4)
    assert 9 <= len(rows) <= 12
    assert len(set(rows)) == len(rows)
