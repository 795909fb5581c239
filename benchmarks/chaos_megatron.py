"""Faults on the real trainer: a tiny model, Megatron-Core on the CPU, replayed groups through the real controller.

Killed and resumed, the run must end with the weights of one that was left alone.
"""

import time
from pathlib import Path
from typing import Any

from chaos_controller import pierce
from chaos_plan import Fault
from chaos_points import Points
from chaos_trainer import GATE
from chaos_world import World

from asympo_megatron.cli.main import main as asympo
from asympo_megatron.mcore import Checkpoints, Learner, checkpoint_save
from asympo_megatron.trainer.client import ControllerClient
from asympo_megatron.trainer.rows import MetricsRows

FAULTS = (
    Fault("trainer", "lease", "lease:after", "kill"),
    Fault("trainer", "step", "step:before", "kill"),
    Fault("controller", "lease", "lease:after", "kill"),
    Fault("trainer", "checkpoint", "save:before", "kill"),
    Fault("trainer", "checkpoint", "marker:before", "kill"),
    Fault("trainer", "step", "step:after", "replace"),
    Fault("trainer", "checkpoint", "marker:after", "kill"),
    Fault("controller", "checkpoint", "commit:before", "kill"),
    Fault("trainer", "checkpoint", "commit:after", "kill"),
    Fault("trainer", "checkpoint", "save:before", "disk_full"),
)
PIERCED: tuple[tuple[Any, str, str], ...] = (
    (Learner, "step", "step"),
    (Checkpoints, "begin", "save"),
    (checkpoint_save, "write_marker", "marker"),
    (ControllerClient, "lease", "lease"),
    (ControllerClient, "commit", "commit"),
)
STEPS = 60


def prepare(home: Path) -> None:
    """A model, groups to replay and a config file."""
    import yaml

    from asympo_megatron.records import write_groups
    from asympo_megatron.testing.replay import random_groups
    from asympo_megatron.testing.tiny_model import make_tiny_model

    make_tiny_model(home / "model", tied=True)
    write_groups(home / "groups.jsonl", random_groups(16))
    config: dict[str, Any] = {
        "run": {"steps": STEPS, "root": str(home / "runs")},
        "model": {"path": str(home / "model"), "init": "hf"},
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
        "batch": {"groups_per_step": 4, "group_size": 4, "max_tokens_per_microbatch": 128},
        "rollout": {"source": "replay", "replay": str(home / "groups.jsonl"), "max_lag_steps": 4},
        "checkpoint": {"interval_steps": 3},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(config))


def run_alone(world: World) -> None:
    """The same run from start to end, without a controller."""
    asympo(["train", str(world.path / "run.yaml"), "run.name=alone"])


def run_real_controller(world: World) -> None:
    pierce(Points(world.path, "controller"))
    port = f"rollout.controller_port={world.controller_port}"
    raise SystemExit(asympo(["control", str(world.path / "run.yaml"), f"run.name={world.name}", port]))


def run_real_trainer(world: World) -> None:
    """`asympo train`, with points, a gate before each step and an event after it."""
    points = Points(world.path, "trainer")
    step, write = Learner.step, MetricsRows.write

    def gated(self: Learner, *arguments: Any) -> Any:
        while self.step_count >= int((world.path / GATE).read_text()):
            time.sleep(0.01)
        return step(self, *arguments)

    def noted(self: MetricsRows, number: int, lease: Any, figures: Any, checksum: str, laps: Any) -> None:
        points.note("trained", step=number, checksum=checksum)
        write(self, number, lease, figures, checksum, laps)

    Learner.step, MetricsRows.write = gated, noted  # type: ignore[method-assign]
    for owner, name, point in PIERCED:
        points.pierce(owner, name, point)
    url = f"rollout.controller_url={world.controller_url}"
    code = asympo(["train", str(world.path / "run.yaml"), f"run.name={world.name}", url])
    points.note("exit", code=code, why=_last_error(world.path / "trainer.log") if code == 1 else "")
    raise SystemExit(code)


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if "Error" in line]
    return lines[-1].removeprefix("asympo: ") if lines else "no reason in the log"


def checksums(run: Path) -> list[str]:
    """Weights after every step, as the metrics have them."""
    from asympo_megatron.metrics import read_rows

    return [row["train/weights_checksum"] for row in read_rows(run / "metrics.jsonl") if row["step"] > 0]
