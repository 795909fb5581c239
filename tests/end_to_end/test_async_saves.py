"""Whole runs that save while they train: the same weights, and a kill costs what it costs with other saves."""

import json
import os
import signal

import pytest
from test_replay import wait_until_between_checkpoints

from asympo_megatron.launch.ports import free_port

pytestmark = pytest.mark.slow

ASYNC = "checkpoint.async_save=true"


def _committed(bench, name):
    """The steps of the complete checkpoints of a run, oldest first."""
    folder = bench.path / "runs" / name / "checkpoints"
    return [json.loads((path / "complete").read_text())["step"] for path in sorted(folder.iterdir())]


def test_the_same_run_and_a_killed_one(bench):
    more = ["run.steps=60", "checkpoint.interval_steps=10"]
    bench.run("train", str(bench.config), "run.name=waiting", *more)
    port = free_port()
    controller = bench.start("control", str(bench.config), "run.name=killed", f"rollout.controller_port={port}", *more)
    trained = [*more, ASYNC, f"rollout.controller_url=http://127.0.0.1:{port}"]
    first = bench.start("train", str(bench.config), "run.name=killed", *trained)
    wait_until_between_checkpoints(bench, "killed", 10, first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    bench.run("train", str(bench.config), "run.name=killed", *trained)
    controller.terminate()
    controller.wait(timeout=120)
    assert bench.checksums("killed") == bench.checksums("waiting")
    assert [row["incarnation"] for row in bench.rows("killed")][-1] == 2
    assert _committed(bench, "killed") == _committed(bench, "waiting") == [50, 60]


def test_a_signal_is_answered_with_a_complete_checkpoint(bench):
    more = ["run.steps=4000", "checkpoint.interval_steps=10", ASYNC]
    process = bench.start("train", str(bench.config), "run.name=preempted", *more)
    wait_until_between_checkpoints(bench, "preempted", 10, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 75, output[-4000:]
    assert _committed(bench, "preempted")[-1] == bench.rows("preempted")[-1]["step"]
