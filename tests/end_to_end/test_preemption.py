"""A batch system's signal: the step is finished, saved and committed, the exit code says requeue, nothing changes."""

import os
import signal
import sqlite3
import sys

import psutil
import pytest

from asympo_megatron.config import RunDir
from asympo_megatron.errors import EXIT_REQUEUE
from asympo_megatron.testing.polling import wait_until

LONG = ["run.steps=40", "checkpoint.interval_steps=0"]
"""The last step is saved, and nothing before it unless somebody asks."""
RANKS = [sys.executable, "-m", "asympo_megatron.launch.ranks", "--standalone", "--nproc-per-node=2"]
TRAIN = ["-m", "asympo_megatron.cli.main"]


def start_and_wait_for_steps(bench, name, *command, launcher=None, steps=3, timeout_s=400.0):
    process = bench.start(*command, str(bench.config), f"run.name={name}", *LONG, launcher=launcher)

    def stepped():
        assert process.poll() is None, process.communicate()[0][-4000:]
        return len(bench.rows(name)) >= steps

    wait_until(stepped, f"{steps} steps of {name}", timeout_s, 0.005)
    return process


def saved_steps(bench, name):
    return sorted(path.name for path in RunDir(bench.path / "runs" / name).checkpoints.iterdir())


def check_preempted(bench, name, process):
    """Exit code and message; exactly the last finished step is saved. Returns that step."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == EXIT_REQUEUE, output[-4000:]
    assert "The same command resumes the run" in output or "has saved and stopped" in output
    last = bench.rows(name)[-1]["step"]
    assert saved_steps(bench, name) == [f"step_{last:06d}"]
    assert 3 <= last < 40
    return last


def check_resumed(bench, name, alone, last):
    """No step was done twice, and every weight is that of the run left alone."""
    rows = bench.rows(name)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert bench.checksums(name) == bench.checksums(alone)
    assert saved_steps(bench, name) == [f"step_{last:06d}", "step_000040"]


@pytest.fixture(scope="module")
def preempted(bench):
    """A trainer of one rank that SIGTERM has ended; the step that it saved."""
    process = start_and_wait_for_steps(bench, "one", "train")
    process.send_signal(signal.SIGTERM)
    return check_preempted(bench, "one", process)


def test_a_trainer_saves_the_finished_step_and_leaves_on_sigterm(preempted):
    assert preempted < 40


@pytest.mark.slow
def test_a_preempted_trainer_resumes_bit_for_bit(bench, preempted):
    bench.run("train", str(bench.config), "run.name=one", *LONG)
    bench.run("train", str(bench.config), "run.name=one_alone", *LONG)
    check_resumed(bench, "one", "one_alone", preempted)


@pytest.mark.slow
@pytest.mark.parametrize("told", ["launcher", "one rank"])
def test_all_ranks_stop_together_whoever_is_told(bench, told):
    name = told.replace(" ", "_")
    launcher = [*RANKS, *TRAIN]
    process = start_and_wait_for_steps(bench, name, "train", launcher=launcher)
    if told == "launcher":
        process.send_signal(signal.SIGUSR1)
    else:
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2
        ranks[1].send_signal(signal.SIGTERM)
    last = check_preempted(bench, name, process)
    bench.run("train", str(bench.config), f"run.name={name}", *LONG, launcher=launcher)
    bench.run("train", str(bench.config), f"run.name={name}_alone", *LONG, launcher=launcher)
    check_resumed(bench, name, f"{name}_alone", last)


@pytest.mark.slow
def test_a_supervised_run_passes_the_signal_and_the_code_on(bench):
    process = start_and_wait_for_steps(bench, "supervised", "run")
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    last = check_preempted(bench, "supervised", process)
    assert psutil.wait_procs(family, timeout=90)[1] == []
    with sqlite3.connect(RunDir(bench.path / "runs" / "supervised").journal) as journal:
        (state,) = journal.execute("SELECT count(*) FROM groups WHERE lease_step >= ?", (last,)).fetchone()
    assert state <= 4  # at most the batch that was handed out for the step that never began
    bench.run("run", str(bench.config), "run.name=supervised", *LONG)
    bench.run("train", str(bench.config), "run.name=supervised_alone", *LONG)
    check_resumed(bench, "supervised", "supervised_alone", last)


@pytest.mark.slow
def test_the_launcher_passes_on_other_exit_codes(bench):
    output = bench.run("train", str(bench.config), "run.name=bad", "optimizer.lr=-1", launcher=[*RANKS, *TRAIN], code=2)
    assert "optimizer.lr" in output


@pytest.mark.slow
def test_no_rank_outlives_a_launcher_that_is_killed(bench):
    process = start_and_wait_for_steps(bench, "orphans", "train", launcher=[*RANKS, *TRAIN], steps=1)
    ranks = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=90)
    assert psutil.wait_procs(ranks, timeout=90)[1] == []
