"""Scripts of examples/slurm and examples/bare, with stand-ins for Slurm and for the roles: who is told what."""

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]

RECORD = '#!/usr/bin/env bash\nprintf "%q " "$(basename "$0")" "$@" >>"$RECORDED"\necho >>"$RECORDED"\n'

STAND_INS = {
    # Runs the script at once, once for each task of an array, and prints a job id.
    "sbatch": """#!/usr/bin/env bash
set -e
tasks=0
for argument in "$@"; do
  case $argument in --array=0-*) tasks=${argument#--array=0-} ;; esac
done
script=${*: -1}
for ((i = 0; i <= tasks; i++)); do
  SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=70042 SLURM_JOB_NODELIST='n[1-2]' SLURM_NNODES=2 bash "$script" >&2
done
echo "${script##*/}-id"
""",
    # Lists the nodes, and requeues a job unless it was cancelled.
    "scontrol": """#!/usr/bin/env bash
if [[ $1 == show ]]; then
  printf 'n1\\nn2\\n'
elif [[ -n ${CANCELLED:-} ]]; then
  exit 1
else
  echo "scontrol $*" >>"$RECORDED"
fi
""",
    # The highest exit code of the tasks, as the real one.
    "srun": """#!/usr/bin/env bash
code=0
for node in 0 1; do SLURM_NODEID=$node "$@" || code=$?; done
exit "$code"
""",
    "hostname": "#!/usr/bin/env bash\necho host7\n",
    "scancel": RECORD,
    "asympo": RECORD,
    "trainer_python": RECORD + 'exit "${TRAINER_EXIT:-0}"\n',
    "sglang_python": RECORD,
}


@pytest.fixture
def world(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "ASYMPO"))}
    return tmp_path, {
        **kept,
        "PATH": f"{programs}:{kept['PATH']}",
        "ASYMPO": str(programs / "asympo"),
        "PYTHON": str(programs / "trainer_python"),
        "JOURNAL_ROOT": str(tmp_path / "local"),
        "SGLANG_PYTHON": str(programs / "sglang_python"),
        "RECORDED": str(tmp_path / "recorded"),
    }


def run(world, *command, **env):
    folder, base = world
    subprocess.run(command, cwd=folder, env={**base, **env}, check=True, timeout=60, capture_output=True)
    return [shlex.split(line) for line in (folder / "recorded").read_text().splitlines()]


def test_slurm_jobs_find_each_other_by_url(world):
    more = {"ENGINES": "3", "GPUS_PER_ENGINE": "2", "ENGINE": "sglang", "TRAIN_NODES": "2", "ASYMPO_TOKEN": "sesame"}
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "my_run", **more)
    engines, (controller, *trainers), (cancel,) = calls[:3], calls[3:6], calls[6:]
    for port, engine in enumerate(engines, start=30000):
        assert engine[:3] == ["sglang_python", "-m", "sglang.launch_server"]
        assert engine[engine.index("--port") + 1] == str(port)
        assert engine[engine.index("--tp-size") + 1] == "2"
    assert controller[:3] == ["asympo", "control", "some.yaml"]
    assert "run.name=my_run" in controller
    assert "rollout.engine_urls=[http://host7:30000,http://host7:30001,http://host7:30002]" in controller
    assert "rollout.controller_port=20042" in controller
    for rank, trainer in enumerate(trainers):
        assert {"--nnodes=2", f"--node-rank={rank}", "--master-addr=n1", "--nproc-per-node=8"} <= set(trainer)
        assert {"run.name=my_run", "rollout.controller_url=http://host7:20042"} <= set(trainer)
    assert cancel == ["scancel", "engine.sbatch-id", "controller.sbatch-id"]


def test_overrides_reach_every_role_and_rank_0_sends_from_its_own_host(world):
    given = ["sync.transport=collective", "task.path=my data/$HOME"]
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "r", *given, ENGINES="1", ENGINE="embedded")
    engine, controller, *trainers = calls[:4]
    for call in (engine, controller, *trainers):
        assert set(given) <= set(call)
        assert not any(argument.startswith("sync.mirror") for argument in call)
    assert ["sync.host=n1" in call for call in calls[:4]] == [False, False, True, True]
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "r", "sync.host=ib0", ENGINES="1", ENGINE="embedded")
    assert all(call.index("sync.host=ib0") > call.index("sync.host=n1") for call in calls[-3:-1]), "the last one counts"


def test_each_engine_of_a_node_starts_its_mirror_when_it_is_its_turn(world):
    folder, _ = world
    (folder / "bin" / "asympo").write_text(
        """#!/usr/bin/env bash
if [[ $1 == mirror ]]; then
  mkdir "$RECORDED.port" || exit 1 # a second one beside it could not listen
  until [[ -e $RECORDED.last ]]; do sleep 0.01; done
  echo "$*" >>"$RECORDED"
  rmdir "$RECORDED.port"
elif [[ $* == *engine_port=30003* ]]; then
  touch "$RECORDED.last"
fi
"""
    )
    more = {"ENGINES": "4", "ENGINE": "embedded", "MIRROR_PORT": "8701"}
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "my_run", "sync.deltas=8", **more)
    mirrors = [call for call in calls if call[0] == "mirror"]
    assert len(mirrors) == 4
    for call in mirrors:
        assert call[1] == "some.yaml"
        assert {"sync.mirror_host=0.0.0.0", "sync.mirror_port=8701", "sync.deltas=8", "run.name=my_run"} <= set(call)
        assert "rollout.controller_token=${oc.env:ASYMPO_TOKEN}" in call


def test_secrets_stay_off_the_command_lines(world):
    secrets = {"ASYMPO_TOKEN": "sesame", "ASYMPO_ENGINE_KEY": "it's open"}
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "r", ENGINE="embedded", **secrets)
    assert not any(secret in str(calls) for secret in secrets.values())
    told = [call for call in calls if "rollout.controller_token=${oc.env:ASYMPO_TOKEN}" in call]
    assert [call[0] for call in told] == ["asympo", "asympo", "asympo", "trainer_python", "trainer_python"]
    assert all("rollout.engine_api_key=${oc.env:ASYMPO_ENGINE_KEY}" in call for call in told)


def test_sglang_gets_its_key_in_a_file_of_its_owner(world):
    folder, _ = world
    keys = {"ASYMPO_ENGINE_KEY": "it's open"}
    for _ in range(2):  # the second start replaces the file
        calls = run(world, "examples/bare/engine.sh", "30005", **keys)
    file = folder / "runs" / "engine_keys" / "host7-30005.yaml"
    assert calls[-1][calls[-1].index("--config") + 1] == str(file)
    assert "--api-key" not in calls[-1]
    assert OmegaConf.load(file) == {"api-key": "it's open"}
    assert file.stat().st_mode & 0o077 == 0


def test_slurm_jobs_get_secrets_that_nobody_set(world):
    folder, _ = world
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "r", ENGINES="1", ENGINE="sglang")
    controller, *trainers = calls[1:4]
    for call in (controller, *trainers):
        assert "rollout.controller_token=${oc.env:ASYMPO_TOKEN}" in call
        assert "rollout.engine_api_key=${oc.env:ASYMPO_ENGINE_KEY}" in call
    (file,) = (folder / "runs" / "engine_keys").iterdir()
    assert re.fullmatch("[0-9a-f]{32}", OmegaConf.load(file)["api-key"])
    assert (folder / "runs" / "r" / "slurm").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("secrets", [{}, {"ASYMPO_TOKEN": "sesame"}, {"ASYMPO_ENGINE_KEY": "open"}])
@pytest.mark.parametrize("role", [["engine.sh", "30000"], ["controller.sh", "http://e0:30000"]])
def test_a_server_on_the_network_needs_both_secrets(world, role, secrets):
    folder, env = world
    command = [f"examples/bare/{role[0]}", *role[1:]]
    open_to_all = {**env, **secrets, "BIND": "0.0.0.0"}
    done = subprocess.run(command, cwd=folder, env=open_to_all, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 2
    assert "set ASYMPO_TOKEN and ASYMPO_ENGINE_KEY" in done.stderr
    assert not (folder / "recorded").exists()


def test_a_role_without_its_arguments_says_its_usage(world):
    folder, env = world
    for script in ("engine.sh", "controller.sh", "trainer.sh"):
        done = subprocess.run(
            [f"examples/bare/{script}"], cwd=folder, env=env, check=False, timeout=60, capture_output=True, text=True
        )
        assert done.returncode != 0
        assert f"usage: {script}" in done.stderr


@pytest.mark.parametrize(
    ("code", "cancelled", "expected"),
    [
        ("75", "", ["scontrol", "requeue", "70042"]),
        ("75", "yes", ["scancel", "engine.sbatch-id", "controller.sbatch-id"]),
        ("1", "", ["scancel", "engine.sbatch-id", "controller.sbatch-id"]),
    ],
)
def test_a_trainer_that_saved_is_requeued_and_its_servers_stay(world, code, cancelled, expected):
    folder, env = world
    more = {"ENGINE": "embedded", "TRAINER_EXIT": code, "CANCELLED": cancelled}
    command = ["examples/slurm/submit.sh", "some.yaml", "r"]
    done = subprocess.run(command, cwd=folder, env={**env, **more}, check=False, timeout=60, capture_output=True)
    assert done.returncode == int(code)  # the stand-in for sbatch runs the job and passes its code on
    assert shlex.split((folder / "recorded").read_text().splitlines()[-1]) == expected


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
