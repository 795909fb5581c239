"""Runs cells on real ranks, one start a world size, and compares what all ranks saw with the reference."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lattice_cells import SHAPES, Cell
from lattice_ranks import PROGRAM, reference_file, write_reference

from asympo_megatron.testing.megatron import run_ranks

START_S, CELL_S = 120.0, 12.0
"""Time-out of a start and of a cell: ten times what they take on two idle cores."""


@dataclass(frozen=True)
class Outcome:
    """The largest errors of a cell over all ranks and steps.

    Args:
        errors: relative L2 error of every parameter's gradient.
        loss, norm: of the loss and of the gradient norm. figures: the largest of all other reported figures.
    """

    cell: Cell
    errors: dict[str, float]
    loss: float
    norm: float
    figures: float

    @property
    def parameter(self) -> str:
        return max(self.errors, key=lambda name: self.errors[name])

    @property
    def gradient(self) -> float:
        return self.errors[self.parameter]


def measure(cells: Sequence[Cell], folder: Path) -> list[Outcome]:
    """All ``cells``, which have one number of ranks, in one start of them."""
    order = sorted(cells, key=lambda cell: list(SHAPES).index(cell.layout))
    for cell in order:
        write_reference(folder, cell)
    payload = {"cells": [asdict(cell) for cell in order], "folder": str(folder)}
    ranks = run_ranks(f"{PROGRAM}:run_cells", order[0].ranks, payload, timeout_s=START_S + CELL_S * len(order))
    return [_join(cell, results, folder) for cell, results in zip(order, zip(*ranks, strict=True), strict=True)]


def _join(cell: Cell, results: Sequence[dict[str, Any]], folder: Path) -> Outcome:
    errors: dict[str, float] = {}
    for result in results:
        for name, error in result["errors"].items():
            errors[name] = max(error, errors.get(name, 0.0))
    wanted = torch.load(reference_file(folder, cell), weights_only=True)[0]["gradients"]
    assert errors.keys() == wanted.keys(), "the ranks together do not hold the parameters of the whole model"
    worst = {name: max(result[name] for result in results) for name in ("loss", "norm", "figures")}
    return Outcome(cell, errors, **worst)


class Lattice:
    """Outcomes by cell; the first question about a number of ranks measures all selected cells that have it."""

    def __init__(self, folder: Path, selected: Sequence[Cell]) -> None:
        self._folder, self._selected = folder, list(dict.fromkeys(selected))
        self._failures: set[int] = set()
        self.outcomes: dict[Cell, Outcome] = {}

    def __getitem__(self, cell: Cell) -> Outcome:
        if cell.ranks in self._failures:
            raise RuntimeError(f"the start of {cell.ranks} ranks failed, as the first cell says.")
        if cell not in self.outcomes:
            same = [other for other in self._selected if other.ranks == cell.ranks]
            try:
                self.outcomes |= {outcome.cell: outcome for outcome in measure(same, self._folder)}
            except Exception:
                self._failures.add(cell.ranks)
                raise
        return self.outcomes[cell]
