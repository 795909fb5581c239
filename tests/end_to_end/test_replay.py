"""Replayed groups: layouts, the asynchronous path, and a trainer that is killed give the same weights."""

import os
import signal
import sys

import pytest
from command_bench import STEPS

from asympo_megatron.launch.ports import free_port
from asympo_megatron.testing.polling import wait_until

FIGURES = ("train/J", "train/loss", "train/nll_pos", "train/nll_neg", "train/grad_norm")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ["-m", "asympo_megatron.cli.main"]


@pytest.fixture(scope="module")
def straight(bench):
    """The uninterrupted, synchronous, single-rank run that everything else must reproduce."""
    bench.run("train", str(bench.config), "run.name=straight")
    rows = bench.rows("straight")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    bench.run("report", "runs/straight")
    assert len(set(bench.checksums("straight"))) == STEPS  # every step moved the weights
    return rows


def test_asynchronous_path_gives_the_same_bits(bench, straight):
    bench.run("run", str(bench.config), "run.name=asynchronous", "rollout.max_lag_steps=4")
    assert bench.checksums("asynchronous") == [row["train/weights_checksum"] for row in straight]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_parallel_layouts_give_the_single_rank_figures(bench, straight, layout):
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *TRAIN]
    bench.run("train", str(bench.config), f"run.name={layout}", f"parallel.{layout}=2", launcher=launcher)
    for found, expected in zip(bench.rows(layout), straight, strict=True):
        for name in FIGURES:
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (name, found["step"])


@pytest.mark.multihost
def test_two_agents_give_the_one_agent_result(bench):
    one = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *TRAIN]
    bench.run("train", str(bench.config), "run.name=one_agent", launcher=one)
    endpoint = f"127.0.0.1:{free_port()}"
    agents = [
        bench.start(
            "train",
            str(bench.config),
            "run.name=two_agents",
            launcher=[
                *TORCHRUN,
                "--nnodes=2",
                f"--node-rank={rank}",
                "--nproc-per-node=1",
                "--rdzv-backend=static",
                f"--rdzv-endpoint={endpoint}",
                *TRAIN,
            ],
        )
        for rank in range(2)
    ]
    outputs = [agent.communicate(timeout=180)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert bench.checksums("two_agents") == bench.checksums("one_agent")


@pytest.mark.slow
def test_a_killed_trainer_resumes_bit_for_bit(bench):
    """SIGKILL between two checkpoints: the steps done again, and all after them, are those of a run left alone."""
    more = ["run.steps=60", "checkpoint.interval_steps=10"]
    port = free_port()
    controller = bench.start("control", str(bench.config), "run.name=killed", f"rollout.controller_port={port}", *more)
    more.append(f"rollout.controller_url=http://127.0.0.1:{port}")
    first = bench.start("train", str(bench.config), "run.name=killed", *more)
    wait_until_between_checkpoints(bench, "killed", 10, first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = {row["step"]: row["train/weights_checksum"] for row in bench.rows("killed")}
    bench.run("train", str(bench.config), "run.name=killed", *more)
    controller.terminate()
    controller.wait(timeout=120)
    rows = bench.rows("killed")
    after = {row["step"]: row["train/weights_checksum"] for row in rows}
    again = [row["step"] for row in rows if row["step"] in before and row["incarnation"] == 2]
    assert again, "no step was done again, so the test saw nothing"
    assert {step: after[step] for step in before} == before
    bench.run("train", str(bench.config), "run.name=alone", *more[:2])
    assert bench.checksums("killed") == bench.checksums("alone")


def wait_until_between_checkpoints(bench, name, interval, process, timeout_s=400.0):
    """Wait until the last logged step lies well past a checkpoint and well before the next: a kill loses work."""

    def between():
        assert process.poll() is None, process.communicate()[0][-4000:]
        steps = [row["step"] for row in bench.rows(name)]
        return bool(steps) and steps[-1] > interval and 2 <= steps[-1] % interval <= interval - 4

    wait_until(between, f"{name} between two checkpoints", timeout_s, 0.002)
