"""The controller's Slurm job: which engines it waits for, and where it keeps the journal meanwhile and afterwards."""

import signal
import stat
import subprocess

import pytest


def run_controller_job(world, host="host7", **env):
    """One controller job on ``host``, whose controller writes a line into its journal. Engine 0 has begun."""
    folder, base = world
    write_program(world, "hostname", f"echo {host}")
    write_program(
        world,
        "asympo",
        """for argument in "$@"; do
  case $argument in rollout.journal_dir=*) directory=${argument#rollout.journal_dir=} ;; esac
done
mkdir -p "$directory"
echo "$(hostname)" >>"$directory/journal.sqlite"
""",
    )
    rendezvous, disk = folder / "runs" / "r" / "slurm", folder / f"disk_of_{host}"
    rendezvous.mkdir(parents=True, exist_ok=True)
    (rendezvous / "engine0.url").write_text("http://e0:30000\n")
    job = {
        "RENDEZVOUS": str(rendezvous),
        "ROLES": str(folder / "examples" / "bare"),
        "RUN_NAME": "r",
        "ENGINES": "1",
        "ENGINES_JOB": "40",
        "SLURM_JOB_ID": "42",
        "JOURNAL_ROOT": str(disk),
    }
    command = ["bash", "examples/slurm/controller.sbatch"]
    all_of_it = {**base, **job, **env}
    done = subprocess.run(command, cwd=folder, env=all_of_it, check=False, timeout=60, capture_output=True, text=True)
    return done, rendezvous / "journal", disk


def write_program(world, name, body):
    program = world[0] / "bin" / name
    program.write_text(f"#!/usr/bin/env bash\n{body}\n")
    program.chmod(stat.S_IRWXU)


def test_the_journal_lies_on_a_local_disk_and_follows_the_controller(world):
    done, kept, disk = run_controller_job(world)
    assert done.returncode == 0, done.stderr
    (local,) = disk.glob("asympo-*/r/journal.sqlite")
    assert local.read_text() == (kept / "journal.sqlite").read_text() == "host7\n"
    _, _, disk = run_controller_job(world, host="host8")
    (local,) = disk.glob("asympo-*/r/journal.sqlite")
    assert local.read_text() == (kept / "journal.sqlite").read_text() == "host7\nhost8\n"


def test_a_controller_that_never_began_owns_no_journal(world):
    """Cancelled while it waited for engines: the next one may run on another node."""
    run_controller_job(world)
    write_program(world, "sleep", "kill -TERM $PPID")
    done, kept, _ = run_controller_job(world, ENGINES="2", QUEUE="40_0 40_1")
    assert done.returncode == -signal.SIGTERM
    assert not (kept / "owner").exists()
    done, _, _ = run_controller_job(world, host="host8")
    assert done.returncode == 0, done.stderr
    assert (kept / "journal.sqlite").read_text() == "host7\nhost8\n"


def test_a_controller_that_does_not_come_to_start_hands_the_journal_back(world):
    _, kept, _ = run_controller_job(world)
    write_program(world, "mv", 'if [[ $1 == *.url.tmp ]]; then kill -TERM $PPID; else exec /bin/mv "$@"; fi')
    done, _, disk = run_controller_job(world, host="host8")
    assert done.returncode != 0
    assert next(disk.glob("asympo-*/r/journal.sqlite")).read_text() == "host7\n", "it had been taken"
    assert (kept / "journal.sqlite").read_text() == "host7\n"
    assert not (kept / "owner").exists()


def test_a_journal_that_was_left_on_another_node_is_not_passed_over(world):
    _, kept, _ = run_controller_job(world)
    (kept / "owner").write_text("host7\n")  # its node died before the journal was copied
    done, _, _ = run_controller_job(world, host="host8")
    assert done.returncode == 2
    assert "was left on host7" in done.stderr
    done, _, _ = run_controller_job(world, host="host7")  # the node is back, with the newer journal on its disk
    assert done.returncode == 0
    assert (kept / "journal.sqlite").read_text() == "host7\nhost7\n"
    assert not (kept / "owner").exists()


def test_what_another_job_did_with_the_journal_during_the_wait_counts(world):
    _, kept, _ = run_controller_job(world)
    engine_1_begins = 'echo http://e1:30000 >"$RENDEZVOUS/engine1.url"'
    write_program(world, "sleep", f'echo host7+ >"$RENDEZVOUS/journal/journal.sqlite"; {engine_1_begins}')
    run_controller_job(world, host="host8", ENGINES="2", QUEUE="40_0 40_1")
    assert (kept / "journal.sqlite").read_text() == "host7+\nhost8\n"
    (kept.parent / "engine1.url").unlink()
    write_program(world, "sleep", f'echo host9 >"$RENDEZVOUS/journal/owner"; {engine_1_begins}')
    done, _, _ = run_controller_job(world, host="host8", ENGINES="2", QUEUE="40_0 40_1")
    assert done.returncode == 2
    assert "was left on host9" in done.stderr
    assert (kept / "owner").read_text() == "host9\n"


@pytest.mark.parametrize("queue", [{"QUEUE": "40_1 41"}, {}], ids=["listed", "no answer"])
def test_it_waits_for_an_engine_whose_job_may_still_run(world, queue):
    """Engine 0 has said where it is: whether it still runs is the controller's affair."""
    write_program(world, "sleep", 'echo http://e1:30000 >"$RENDEZVOUS/engine1.url"')
    done, _, _ = run_controller_job(world, ENGINES="2", **queue)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("queue", ["40_0 41", "40_10 41", ""])
def test_it_gives_up_when_the_job_of_an_engine_has_ended(world, queue):
    write_program(world, "sleep", 'echo http://e1:30000 >"$RENDEZVOUS/engine1.url"')
    done, kept, _ = run_controller_job(world, ENGINES="2", QUEUE=queue)
    assert done.returncode == 1
    assert "job 40_1 ended before its engine began" in done.stderr
    assert not kept.exists()
