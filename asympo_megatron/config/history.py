"""Which configuration trained which steps of a run.

RUN_DIR/configs/step_000050.yaml is in force from step 50 on: it trained step 51. RUN_DIR/config.yaml is what the run
was started with last.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from asympo_megatron.config.load import config_text, read_config_text
from asympo_megatron.config.rundir import RunDir
from asympo_megatron.config.schema import Config

_OF_A_START = frozenset(
    {
        *(f"rollout.{side}_{what}" for side in ("controller", "engine") for what in ("host", "port")),
        *("rollout.controller_url", "rollout.engine_urls", "rollout.controller_token", "rollout.engine_api_key"),
        *("sync.host", "sync.mirror_host", "sync.mirror_port"),
    }
)
"""Where the roles of one start find each other, and their secrets: another job may have others, and trains the same."""
_MAX_CHARS = 80


@dataclass(frozen=True)
class Change:
    """A key of the configuration and its values, as text; "unset" for a key that is not there."""

    key: str
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (f"{text[:_MAX_CHARS]}..." if len(text) > _MAX_CHARS else text for text in (self.old, self.new))
        return f"{self.key} {old} -> {new}"


@contextmanager
def proposed(run_dir: RunDir, config: Config) -> Iterator[list[Change]]:
    """Inside, config.yaml is ``config``. The one before comes back after an error, unless a trainer was accepted.

    Yields:
        What differs from the configuration that trained last.
    """
    kept, replaces, rows = run_dir.path / ".config.before.yaml", run_dir.config.is_file(), _size(run_dir.metrics)
    if replaces:
        run_dir.config.replace(kept)
    try:
        run_dir.create(config)
        before = in_force(run_dir)
        yield changes_since(before, run_dir) if before else []
    except BaseException:
        if replaces and _size(run_dir.metrics) == rows:  # an accepted trainer writes a row at once
            kept.replace(run_dir.config)
        raise
    finally:
        kept.unlink(missing_ok=True)


def begin(run_dir: RunDir, config: Config, step: int) -> list[Change]:
    """A trainer was accepted and goes on from ``step`` with ``config``: keep it as what trains the steps to come.

    Returns:
        What differs from the configuration that trained the steps up to here.
    """
    started_with = _flat(read_config_text(run_dir.config))
    if {change.key for change in _changes(started_with, _flat(config_text(config)))} - {"model.init"}:
        run_dir.create(config)  # `asympo run` has done it, and names the warm start's checkpoints as model.init
    for start, path in _starts(run_dir):
        if start > step:  # of steps that are lost
            path.unlink()
    before = in_force(run_dir, step + 1)
    changed = changes_since(before, run_dir) if before else []
    if changed or not before:
        run_dir.keep_config(step)
    return changed


def in_force(run_dir: RunDir, step: int = sys.maxsize) -> Path | None:
    """The configuration that trained ``step``, by default the newest; None where the run kept none."""
    found = [path for start, path in _starts(run_dir) if start < step]
    return found[-1] if found else None


def changes_since(before: Path, run_dir: RunDir) -> list[Change]:
    """What config.yaml changes of an earlier configuration."""
    return _changes(_flat(read_config_text(before)), _flat(read_config_text(run_dir.config)))


def changes(run_dir: RunDir, steps_done: int) -> list[tuple[int, list[Change]]]:
    """From which step on the run trained with what changed; a change after the last step has trained nothing."""
    kept = [(start, _flat(read_config_text(path))) for start, path in _starts(run_dir) if start < steps_done]
    found = [(start, _changes(old, new)) for (_, old), (start, new) in pairwise(kept)]
    return [(start, changed) for start, changed in found if changed]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _starts(run_dir: RunDir) -> list[tuple[int, Path]]:
    return sorted((int(path.stem.removeprefix("step_")), path) for path in run_dir.configs.glob("step_*.yaml"))


def _changes(old: dict[str, str], new: dict[str, str]) -> list[Change]:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in _OF_A_START]
    return [Change(key, old.get(key, "unset"), new.get(key, "unset")) for key in keys]


def _flat(text: str) -> dict[str, str]:
    """The values of a saved configuration by their full keys, as text."""

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                walk(value, (*path, str(name)))
        else:
            found[".".join(path)] = json.dumps(node, ensure_ascii=False)

    found: dict[str, str] = {}
    walk(OmegaConf.to_container(OmegaConf.create(text)), ())
    return found
