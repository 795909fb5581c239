"""The lattice as text: every cell for the terminal, and a shorter page for the documentation."""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from lattice_cells import EXPERTS, MICROBATCHES, PACKINGS, SHAPES, Cell
from lattice_run import Outcome

BEGIN, END = "<!-- lattice: begin -->\n", "<!-- lattice: end -->\n"
COLUMNS = ("gradient", "loss", "norm", "figures")


def terminal_table(outcomes: Iterable[Outcome]) -> str:
    """One line a cell: the four errors, and the parameter of the first."""
    header = f"{'cell':84} {' '.join(f'{name:>8}' for name in COLUMNS)}  parameter"
    lines = [header, *(_line(outcome) for outcome in _in_order(outcomes))]
    return "\n".join([*lines, f"{len(lines) - 1} cells, mutants included"])


def _line(outcome: Outcome) -> str:
    errors = " ".join(f"{getattr(outcome, name):8.1e}" for name in COLUMNS)
    return f"{outcome.cell!s:84} {errors}  {outcome.parameter}"


def page_table(outcomes: Collection[Outcome]) -> str:
    """Markdown: ASymPO's full product a layout a line, the covering a cell a line, mutants."""
    mutants = [outcome for outcome in outcomes if outcome.cell.mutant]
    outcomes = [outcome for outcome in outcomes if not outcome.cell.mutant]
    product = [outcome for outcome in outcomes if _in_product(outcome.cell)]
    covering = [outcome for outcome in _in_order(outcomes) if not _in_product(outcome.cell)]
    columns = [(count, packing) for packing in PACKINGS for count in MICROBATCHES]
    head = ["layout", *(f"{count} mb {packing}" for count, packing in columns), "loss", "norm", "worst parameter"]
    rows = [_row(layout, columns, [o for o in product if o.cell.layout == layout]) for layout in SHAPES]
    parts = [
        "ASymPO, qwen3 with tied embeddings (EP: a mixture of experts, no load-balancing loss):\n",
        _markdown(head, [row for row in rows if row]),
    ]
    if covering:
        head = ["layout", "mb", "packing", "objective", "model", "gradient", "loss", "norm", "worst parameter"]
        parts += ["\nThe pairwise covering:\n", _markdown(head, [_covering_row(outcome) for outcome in covering])]
    if mutants:
        head = ["mutant", "layout", "mb", "packing", "objective", "gradient", "worst parameter"]
        parts += ["\nMutants:\n", _markdown(head, [_mutant_row(outcome) for outcome in mutants])]
    return "\n".join(parts)


def write_page(page: Path, table: str) -> None:
    """Replace what stands between the markers of ``page``."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} needs the lines {BEGIN!r} and {END!r} once each.")
    pattern = re.escape(BEGIN) + ".*" + re.escape(END)
    page.write_text(re.sub(pattern, lambda _: BEGIN + "\n" + table + "\n" + END, text, flags=re.DOTALL))


def _row(layout: str, columns: Sequence[tuple[int, str]], outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return []
    by_column = {(outcome.cell.microbatches, outcome.cell.packing): outcome for outcome in outcomes}
    errors = [f"{by_column[column].gradient:.1e}" if column in by_column else "" for column in columns]
    loss, norm = max(outcome.loss for outcome in outcomes), max(outcome.norm for outcome in outcomes)
    worst = max(outcomes, key=lambda outcome: outcome.gradient)
    return [layout, *errors, f"{loss:.1e}", f"{norm:.1e}", f"`{worst.parameter}`"]


def _covering_row(outcome: Outcome) -> list[str]:
    cell = outcome.cell
    values = [cell.layout, str(cell.microbatches), cell.packing, cell.objective, cell.model]
    errors = [f"{value:.1e}" for value in (outcome.gradient, outcome.loss, outcome.norm)]
    return [*values, *errors, f"`{outcome.parameter}`"]


def _mutant_row(outcome: Outcome) -> list[str]:
    cell = outcome.cell
    values = [cell.mutant, cell.layout, str(cell.microbatches), cell.packing, cell.objective]
    return [*values, f"{outcome.gradient:.1e}", f"`{outcome.parameter}`"]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _in_product(cell: Cell) -> bool:
    return cell.objective == "asympo" and cell.model in ("qwen3-tied", EXPERTS)


def _in_order(outcomes: Iterable[Outcome]) -> list[Outcome]:
    layouts = list(SHAPES)
    return sorted(outcomes, key=lambda o: (bool(o.cell.mutant), not _in_product(o.cell), layouts.index(o.cell.layout)))
