"""Whole commands in their own processes, on a tiny model and replayed groups."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from bench_size import STEPS

from asympo_megatron.metrics import read_rows
from asympo_megatron.records import write_groups
from asympo_megatron.testing.replay import random_groups
from asympo_megatron.testing.tiny_model import make_tiny_model

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
ASYMPO = [sys.executable, "-m", "asympo_megatron.cli.main"]


@dataclass
class Bench:
    """A directory with a tiny model, a replay file and a config; runs commands on them."""

    path: Path
    config: Path
    started: list = field(default_factory=list)

    def start(self, *arguments: str, launcher: list[str] | None = None) -> subprocess.Popen:
        process = subprocess.Popen(
            [*(launcher or ASYMPO), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENV,
            cwd=self.path,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, launcher: list[str] | None = None, code: int = 0, timeout_s: float = 180) -> str:
        """Run a command to its end; returns what it printed."""
        process = self.start(*arguments, launcher=launcher)
        output, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == code, output[-4000:]
        return output

    def rows(self, name: str) -> list[dict]:
        """Metrics rows of a run after row 0."""
        return [row for row in read_rows(self.path / "runs" / name / "metrics.jsonl") if row["step"] > 0]

    def checksums(self, name: str) -> list[str]:
        return [row["train/weights_checksum"] for row in self.rows(name)]


@pytest.fixture(scope="session")
def materials(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("materials")
    make_tiny_model(path / "model", tied=True)
    write_groups(path / "groups.jsonl", random_groups(16))
    return path


@pytest.fixture(scope="module")
def bench(materials, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    config = path / "tiny.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "run": {"steps": STEPS},
                "model": {"path": str(materials / "model"), "init": "hf"},
                "optimizer": {"lr": 1e-3, "eps": 1e-5},
                "batch": {"groups_per_step": 4, "group_size": 4, "max_tokens_per_microbatch": 128},
                "rollout": {"source": "replay", "replay": str(materials / "groups.jsonl"), "max_lag_steps": 4},
                "checkpoint": {"interval_steps": 2},
            }
        )
    )
    bench = Bench(path, config)
    yield bench
    for process in bench.started:
        if process.poll() is None:
            process.kill()
            process.wait()
