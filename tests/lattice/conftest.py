"""Cells of a test file are measured together, tested one by one, and printed as a table at the end."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the ranks' programs import the same helpers

_OUTCOMES = pytest.StashKey[list[Any]]()
_PAGE = "--lattice-page"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_PAGE, type=Path, help="write the table of the lattice into this page")


@pytest.fixture(scope="module")
def lattice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Outcome by cell, of all selected cells of the test file."""
    from lattice_run import Lattice

    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cells = [item.callspec.params["cell"] for item in items if "cell" in item.callspec.params]
    lattice = Lattice(tmp_path_factory.mktemp("references"), cells)
    yield lattice
    request.config.stash.setdefault(_OUTCOMES, []).extend(lattice.outcomes.values())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    outcomes = config.stash.get(_OUTCOMES, [])
    if not outcomes:
        return
    from lattice_table import page_table, terminal_table, write_page

    terminalreporter.section("lattice")
    terminalreporter.write_line(terminal_table(outcomes))
    page = config.getoption(_PAGE, default=None)
    if page is not None:
        write_page(page, page_table(outcomes))
        terminalreporter.write_line(f"table written to {page}")
