"""What a report is drawn from: the files of a run directory, read once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asympo_megatron.config import Config, RunDir, history, load_config
from asympo_megatron.errors import RecordError
from asympo_megatron.metrics.jsonl import Row, read_rows

_SILENT: Mapping[str, tuple[str, ...]] = {
    "engines": (),
    "replay": ("lag/",),
    "supervised": ("lag/", "reward/", "train/J"),
}
"""Metrics that are constant by construction, by rollout.source: groups of a file are not stale, and reference answers
have no reward."""


@dataclass(frozen=True)
class Series:
    """One metric over the steps that report it."""

    steps: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        return self.steps.size > 0

    @property
    def first(self) -> float:
        return float(self.values[0])

    @property
    def last(self) -> float:
        return float(self.values[-1])

    @property
    def mean(self) -> float:
        return float(self.values.mean())


@dataclass(frozen=True)
class RunData:
    """A run as its files tell it."""

    path: Path
    config_file: Path
    config: Config
    """That trained the last row."""
    changes: Sequence[tuple[int, Sequence[history.Change]]]
    """Of the configuration: from which step on, and what."""
    rows: Sequence[Row]
    warmup_rows: Sequence[Row]
    parameters: int | None
    """Number of model parameters, from the newest published weights; None when none lie in the run directory."""

    def series(self, name: str) -> Series:
        """A metric by step; rows without it, or with null, are left out, and so is what means nothing in this run."""
        silent = _SILENT[self.config.rollout.source]
        return series(self.rows if not name.startswith(silent) else (), name)

    @property
    def scored(self) -> str:
        """What an evaluation's mean reward is: an accuracy only where rewards lie between 0 and 1."""
        values = self.series("eval/accuracy").values
        return "accuracy" if ((values >= 0) & (values <= 1)).all() else "reward"

    def score(self, value: float) -> str:
        """A mean reward of an evaluation as it is read."""
        return f"{value:.1%}" if self.scored == "accuracy" else f"{value:.3f}"

    @property
    def steps_done(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def is_rl(self) -> bool:
        return self.config.rollout.source != "supervised"


def load_run(run_dir: str | Path) -> RunData:
    """Read a run directory.

    Raises:
        RecordError: it is no run directory, or no step has been recorded yet.
    """
    where = RunDir(Path(run_dir))
    if not where.config.is_file():
        raise RecordError(f"{where.path} holds no config.yaml: it is not the directory of a run (runs/NAME).")
    rows = read_rows(where.metrics)
    if not rows:
        raise RecordError(f"{where.metrics} has no row yet: nothing to report. See {where.logs} for what happened.")
    steps_done = int(rows[-1]["step"])
    config_file = history.in_force(where, steps_done) or where.config
    return RunData(
        path=where.path,
        config_file=config_file,
        config=load_config(config_file),
        changes=history.changes(where, steps_done),
        rows=rows,
        warmup_rows=read_rows(RunDir(where.warmup).metrics),
        parameters=_parameters(where.weights),
    )


def series(rows: Sequence[Row], name: str) -> Series:
    """A metric by step; rows without it, or with null, are left out."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return Series(np.array([step for step, _ in found]), np.array([value for _, value in found], dtype=float))


def _parameters(weights: Path) -> int | None:
    """Elements of the tensors in the newest version; a safetensors file starts with its header's size and JSON."""
    versions = sorted(path for path in weights.glob("v*") if path.is_dir())
    if not versions:
        return None
    total = 0
    for file in versions[-1].glob("*.safetensors"):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        total += sum(int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__")
    return total or None
