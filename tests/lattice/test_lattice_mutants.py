"""Mistakes that trainers have had, each caught by a cell: what the lattice would not notice, it does not show."""

from pathlib import Path

import pytest
from lattice_cells import Cell
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
    "deallocated outputs under VPP": Cell("PP2xVPP2", 4, "packed", "asympo"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", CASES)
def test_mutant_is_caught(tmp_path: Path, mutant: str) -> None:
    (outcome,) = measure([CASES[mutant]], tmp_path, mutant)
    assert outcome.gradient > CAUGHT


@pytest.mark.slow
def test_without_the_anchor_the_ranks_wait_for_ever(tmp_path: Path) -> None:
    """The lonely batch leaves one context shard without a trained token: it must run the backward pass all the same."""
    with pytest.raises(RankError, match=f"ended with code {HUNG}"):
        measure([Cell("CP2", 1, "packed", "asympo")], tmp_path, "no anchor")


def test_every_mutant_has_a_cell() -> None:
    assert {*CASES, "no anchor"} == set(MUTANTS)
