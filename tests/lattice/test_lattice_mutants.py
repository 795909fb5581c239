"""Mistakes that trainers have had, each caught by a cell: what the lattice would not notice, it does not show."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lattice_cells import ONE_KV_HEAD, Cell
from lattice_mutants import HUNG, MUTANTS
from lattice_run import measure

from asympo_megatron.testing.megatron import RankError

CAUGHT = 2e-3
"""A hundred times the goal of the true cells."""

CASES = {
    "local sums": Cell("CP2", 1, "packed", "asympo"),
    "mean of local means": Cell("DP2", 2, "packed", "asympo"),
    "count on every context rank": Cell("CP2", 2, "padded", "asympo"),
    "count of one context shard": Cell("CP2", 1, "packed", "sft"),
    "3-tuple divided by the schedule": Cell("CP2", 1, "packed", "asympo"),
    "2-tuple": Cell("CP2", 2, "packed", "reinforce"),
    "norm gradients not summed under SP": Cell("TP2+SP", 1, "packed", "asympo"),
    "gradients of a shared head not summed": Cell("TP2", 2, "packed", "asympo", ONE_KV_HEAD),
    "deallocated outputs under VPP": Cell("PP2xVPP2", 16, "padded", "asympo"),  # one row each, all of one length
}


HARMLESS = replace(CASES["deallocated outputs under VPP"], mutant="late receiver")
"""What the mutant of deallocated outputs needs to show, without the mistake."""

FAST = ("local sums", "count on every context rank", "norm gradients not summed under SP")
CELLS = [
    pytest.param(replace(cell, mutant=mutant), id=mutant, marks=[] if mutant in FAST else pytest.mark.slow)
    for mutant, cell in CASES.items()
]


@pytest.mark.parametrize("cell", CELLS)
def test_mutant_is_caught(lattice: Any, cell: Cell) -> None:
    assert lattice[cell].gradient > CAUGHT


@pytest.mark.slow
@pytest.mark.parametrize("cell", [HARMLESS], ids=str)
def test_a_late_receiver_alone_changes_nothing(lattice: Any, cell: Cell) -> None:
    assert lattice[cell].gradient < 2e-5


@pytest.mark.slow
def test_without_the_anchor_the_ranks_wait_for_ever(tmp_path: Path) -> None:
    """The lonely batch leaves one context shard without a trained token: it must run the backward pass all the same."""
    with pytest.raises(RankError, match=f"ended with code {HUNG}"):
        measure([Cell("CP2", 1, "packed", "asympo", mutant="no anchor")], tmp_path)


def test_every_mutant_has_a_cell() -> None:
    assert {*CASES, "no anchor", HARMLESS.mutant} == set(MUTANTS)
