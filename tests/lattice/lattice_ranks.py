"""What the ranks of the lattice run: cells against a reference that one rank has left in a file."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lattice_cells import BALANCED, OPTIONS, Cell
from lattice_data import MAX_TOKENS, deal, global_batches, rectangle, rows_of
from lattice_mutants import MUTANTS, Mutant

from asympo_megatron.config import Config
from asympo_megatron.config.validate import validate
from asympo_megatron.errors import NonFiniteLossError
from asympo_megatron.mcore import Layout, Learner, initialize
from asympo_megatron.objectives import build_objective
from asympo_megatron.testing.gradients import GradientProbe, relative_error, relative_errors
from asympo_megatron.testing.megatron import join_group, leave_groups

PROGRAM = __file__
STEPS = 3


def config_of(cell: Cell) -> Config:
    """The configuration of a run in this cell."""
    config = Config()
    config.run.steps = 8
    config.model.hf = dict(cell.hf)
    config.model.init_std = 0.2  # far from uniform predictions, so that gradients are worth comparing
    config.model.dtype = cell.dtype
    config.optimizer.lr = 1e-3
    config.optimizer.eps = 1e-5  # 1e-8 turns rounding noise of tiny gradients into different directions
    config.optimizer.distributed = cell.shape.distributed
    config.ddp.megatron = dict(cell.shape.ddp)
    config.batch.max_tokens_per_microbatch = MAX_TOKENS
    config.rollout.source = "supervised"
    config.objective.name = "sft"
    config.advantage.estimator = "none"
    for name, value in cell.shape.parallel.items():
        setattr(config.parallel, name, value)
    validate(config)
    return config


def run_cells(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure cells on these ranks: the process groups once a layout, a new learner in each cell."""
    cells = [Cell(**cell) for cell in payload["cells"]]
    results = []
    for number, (_, same_layout) in enumerate(groupby(cells, key=lambda cell: cell.layout)):
        members = list(same_layout)
        with joined(f"layout {number}", members[0]) as layout:
            for cell in members:
                print(f"cell: {cell}", flush=True)  # the end of a rank's output is all that a time-out leaves
                reference = torch.load(reference_file(Path(payload["folder"]), cell), weights_only=True)
                results.append(_compare(cell, layout, reference))
    return results


@contextmanager
def joined(name: str, cell: Cell) -> Iterator[Layout]:
    """The process groups of a cell's layout."""
    if cell.ranks > 1:
        join_group(name)
    try:
        yield initialize(config_of(cell))
    finally:
        leave_groups()


def reference_file(folder: Path, cell: Cell) -> Path:
    """Where the reference of a cell is kept."""
    return folder / f"{cell.objective} {cell.model} {cell.dtype} {cell.reference.microbatches}.pt"


def write_reference(folder: Path, cell: Cell) -> None:
    """Run the reference of a cell in this process; for bf16 that is fp32 from the weights which bf16 can hold."""
    file = reference_file(folder, cell)
    if not file.exists():
        reference = Cell(**{**asdict(cell.reference), "dtype": "fp32"})
        with joined("reference", reference) as layout:
            torch.save(list(_steps(reference, layout, rounded=cell.dtype == "bf16")), file)


def _compare(cell: Cell, layout: Layout, reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Worst errors of this rank over the steps, of the gradients it holds and of the figures it reports."""
    errors: dict[str, float] = {}
    figures = {"loss": 0.0, "norm": 0.0, "figures": 0.0}
    try:
        for got, wanted in zip(_steps(cell, layout), reference, strict=True):
            for name, error in relative_errors(got["gradients"], wanted["gradients"]).items():
                errors[name] = max(error, errors.get(name, 0.0))
            left_out = {"lr"} if cell.model == BALANCED else {"lr", "moe_balance"}  # see Cell.reference
            for name, error in _figure_errors(got["figures"], wanted["figures"], left_out).items():
                figures[name] = max(error, figures[name])
    except NonFiniteLossError:
        if not cell.mutant:
            raise
        errors = dict.fromkeys(reference[0]["gradients"], math.inf)
    return {"errors": errors, **figures}


def _figure_errors(got: dict[str, float], wanted: dict[str, float], left_out: set[str]) -> dict[str, float]:
    """Of the loss relative to it or, where its terms cancel, to 1/N sum |A|; of the norm; the largest of the others."""
    scale = wanted["advantage_scale"]
    errors = {
        name: abs(got[name] - value) / max(abs(value), scale)
        for name, value in wanted.items()
        if name not in ("grad_norm", "advantage_scale", *left_out)
    }
    # An objective may clip or mask the one trained token of a batch: then there is no gradient at all.
    norm = relative_error(torch.tensor(got["grad_norm"]), torch.tensor(wanted["grad_norm"]))
    return {"loss": errors.pop("loss"), "norm": norm, "figures": max(errors.values())}


def _steps(cell: Cell, layout: Layout, rounded: bool = False) -> Iterator[dict[str, Any]]:
    """Train, and yield gradients and figures of every step."""
    config = config_of(cell)
    mutant = MUTANTS[cell.mutant] if cell.mutant else Mutant()
    with mutant.around():
        objective = build_objective(cell.objective, **OPTIONS.get(cell.objective, {}))
        learner = Learner(config, config.model.hf, mutant.objective(objective), layout)
        if rounded:
            _round(learner)
        probe = GradientProbe(learner)
        mutant.after_build(learner)
        for groups in global_batches(1 if cell.dtype == "bf16" or rounded else STEPS):
            rows = rows_of(groups)
            # The learner packs with the layout it holds; a rectangle is that layout with longer sequences.
            learner.layout = rectangle(rows, layout) if cell.packing == "padded" else layout
            figures = learner.step(deal(rows, cell.microbatches, layout.dp_rank, layout.dp_size), len(rows))
            figures["advantage_scale"] = sum(abs(row.advantage) for row in rows) / len(rows)
            yield {"gradients": probe.gradients, "figures": figures}


@torch.no_grad()
def _round(learner: Learner) -> None:
    """Keep of every weight what bf16 can hold."""
    for shard in learner.shards():
        shard.param.copy_(shard.param.bfloat16())
    learner.weights_changed()
