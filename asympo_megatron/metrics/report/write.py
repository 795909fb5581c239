"""Writes the page."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from asympo_megatron.config.load import config_text
from asympo_megatron.metrics.secrets import without_secrets

if TYPE_CHECKING:
    from asympo_megatron.metrics.report.rundata import RunData


def write_report(run_dir: str | Path) -> Path:
    """Draw RUN_DIR/report.html from configuration and metrics.jsonl (and the warm start's metrics, if there are any).

    Raises:
        RecordError: not a run directory, or no step has been recorded yet.
    """
    # Imported here: every role imports this package, and only a report needs matplotlib.
    from asympo_megatron.metrics.report.page import render
    from asympo_megatron.metrics.report.plots import draw_sections
    from asympo_megatron.metrics.report.rundata import load_run

    run = load_run(run_dir)
    config_yaml = config_text(without_secrets(run.config))
    page = render(run, draw_sections(run), _command(run), config_yaml)
    path = run.path / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    return temporary.replace(path)


def _command(run: "RunData") -> str:
    """The saved configuration is complete, whatever was typed; the same name would resume the run that is done."""
    path, again = str(run.config_file), f"run.name={run.config.run.name}-again"
    return f"asympo run {shlex.quote(path)} {shlex.quote(again)}"
