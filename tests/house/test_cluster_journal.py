"""Where the controller's Slurm job keeps the journal: on a local disk while it runs, beside the logs in between."""

import stat
import subprocess


def run_controller_job(world, host="host7"):
    """One controller job on ``host``, whose controller writes a line into its journal."""
    folder, env = world
    (folder / "bin" / "hostname").write_text(f"#!/usr/bin/env bash\necho {host}\n")
    (folder / "bin" / "asympo").write_text(
        """#!/usr/bin/env bash
for argument in "$@"; do
  case $argument in rollout.journal_dir=*) directory=${argument#rollout.journal_dir=} ;; esac
done
mkdir -p "$directory"
echo "$(hostname)" >>"$directory/journal.sqlite"
"""
    )
    rendezvous = folder / "runs" / "r" / "slurm"
    rendezvous.mkdir(parents=True, exist_ok=True)
    (rendezvous / "engine0.url").write_text("http://e0:30000\n")
    job = {
        "RENDEZVOUS": str(rendezvous),
        "ROLES": str(folder / "examples" / "bare"),
        "RUN_NAME": "r",
        "ENGINES": "1",
        "SLURM_JOB_ID": "42",
    }
    command = ["bash", "examples/slurm/controller.sbatch"]
    done = subprocess.run(
        command, cwd=folder, env={**env, **job}, check=False, timeout=60, capture_output=True, text=True
    )
    return done, rendezvous / "journal"


def test_the_journal_lies_on_a_local_disk_and_follows_the_controller(world):
    folder, _ = world
    done, kept = run_controller_job(world)
    assert done.returncode == 0, done.stderr
    (local,) = (folder / "local").glob("asympo-*/r/journal.sqlite")
    assert local.read_text() == (kept / "journal.sqlite").read_text() == "host7\n"
    local.unlink()  # the next node has another disk
    run_controller_job(world, host="host8")
    assert local.read_text() == (kept / "journal.sqlite").read_text() == "host7\nhost8\n"


def test_a_controller_that_never_began_owns_no_journal(world):
    """Cancelled while it waited for engines: the next one may run on another node."""
    folder, env = world
    (folder / "bin" / "sleep").write_text("#!/usr/bin/env bash\nkill -TERM $PPID\n")
    (folder / "bin" / "sleep").chmod(stat.S_IRWXU)
    job = {"RENDEZVOUS": str(folder), "RUN_NAME": "r", "ENGINES": "1", "SLURM_JOB_ID": "42", "ROLES": ""}
    done = subprocess.run(
        ["bash", "examples/slurm/controller.sbatch"], cwd=folder, env={**env, **job}, check=False, timeout=60
    )
    assert done.returncode < 0
    assert not (folder / "journal").exists()


def test_a_journal_that_was_left_on_another_node_is_not_passed_over(world):
    _, kept = run_controller_job(world)
    (kept / "owner").write_text("host7\n")  # its node died before the journal was copied
    done, _ = run_controller_job(world, host="host8")
    assert done.returncode == 2
    assert "was left on host7" in done.stderr
    done, _ = run_controller_job(world, host="host7")  # the node is back, with the newer journal on its disk
    assert done.returncode == 0
    assert (kept / "journal.sqlite").read_text() == "host7\nhost7\n"
    assert not (kept / "owner").exists()
