"""One lattice a session: cells are measured together, tested one by one, printed as a table at the end."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the ranks' programs import the same helpers

_LATTICE = pytest.StashKey[Any]()
_PAGE = "--lattice-page"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_PAGE, type=Path, help="write the table of the lattice into this page")


@pytest.fixture(scope="session")
def lattice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Outcome by cell, of all cells that this session selects."""
    from lattice_run import Lattice

    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    cells = [call.params["cell"] for call in calls if "cell" in call.params]
    lattice = Lattice(tmp_path_factory.mktemp("references"), cells)
    request.config.stash[_LATTICE] = lattice
    return lattice


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lattice = config.stash.get(_LATTICE, None)
    if lattice is None or not lattice.outcomes:
        return
    from lattice_table import page_table, terminal_table, write_page

    terminalreporter.section("lattice")
    terminalreporter.write_line(terminal_table(lattice.outcomes.values()))
    page = config.getoption(_PAGE, default=None)
    if page is not None:
        write_page(page, page_table(lattice.outcomes.values()))
        terminalreporter.write_line(f"table written to {page}")
