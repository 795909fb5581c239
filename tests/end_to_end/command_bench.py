"""Runs whole commands in a directory of their own."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from asympo_megatron.metrics import read_rows

STEPS = 5
"""Steps of the replayed run that everything else is compared with."""
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

    def run(self, *arguments: str, launcher: list[str] | None = None, code: int = 0, timeout_s: float = 400) -> str:
        """Run a command to its end; returns what it printed."""
        process = self.start(*arguments, launcher=launcher)
        output, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == code, output[-4000:]
        return output

    def stop(self) -> None:
        """End what a failed test left running; supervisors stop their own children."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=120)

    def rows(self, name: str) -> list[dict]:
        """Metrics rows of a run after row 0."""
        return [row for row in read_rows(self.path / "runs" / name / "metrics.jsonl") if row["step"] > 0]

    def checksums(self, name: str) -> list[str]:
        return [row["train/weights_checksum"] for row in self.rows(name)]
