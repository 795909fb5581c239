"""report.html: what happened in a run, on one page that needs nothing else."""

import shlex
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from asympo_megatron.config import Config

SECRETS = ("controller_token", "engine_api_key")
"""Fields of ``rollout`` that no report or tracker may show."""


def write_report(run_dir: str | Path) -> Path:
    """Draw RUN_DIR/report.html from config.yaml and metrics.jsonl (and the warm start's metrics, if there are any).

    Raises:
        RecordError: not a run directory, or no step has been recorded yet.
    """
    # Imported here: every role imports this package, and only a report needs matplotlib.
    from asympo_megatron.metrics.page import render
    from asympo_megatron.metrics.plots import draw
    from asympo_megatron.metrics.rundata import load_run

    run = load_run(run_dir)
    config_yaml = OmegaConf.to_yaml(OmegaConf.structured(without_secrets(run.config)))
    page = render(run, draw(run), _command(run.path), config_yaml)
    path = run.path / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    return temporary.replace(path)


def without_secrets(config: Config) -> Config:
    """A copy whose tokens and keys are hidden."""
    hidden = {name: "(hidden)" for name in SECRETS if getattr(config.rollout, name)}
    return replace(config, rollout=replace(config.rollout, **hidden))


def _command(run_dir: Path) -> str:
    """The command that was typed, where the run kept it; the saved configuration always gives the same run."""
    kept = run_dir / "command.txt"
    if kept.is_file():
        return kept.read_text().strip()
    return f"asympo run {shlex.quote(str(run_dir / 'config.yaml'))}"
