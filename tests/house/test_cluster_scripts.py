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
    "scontrol": "#!/usr/bin/env bash\nprintf 'n1\\nn2\\n'\n",
    "srun": '#!/usr/bin/env bash\nfor node in 0 1; do SLURM_NODEID=$node "$@"; done\n',
    "hostname": "#!/usr/bin/env bash\necho host7\n",
    "scancel": RECORD,
    "asympo": RECORD,
    "torchrun": RECORD,
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
        "TORCHRUN": str(programs / "torchrun"),
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


def test_secrets_stay_off_the_command_lines(world):
    secrets = {"ASYMPO_TOKEN": "sesame", "ASYMPO_ENGINE_KEY": "it's open"}
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "r", ENGINE="embedded", **secrets)
    assert not any(secret in str(calls) for secret in secrets.values())
    told = [call for call in calls if "rollout.controller_token=${oc.env:ASYMPO_TOKEN}" in call]
    assert [call[0] for call in told] == ["asympo", "asympo", "asympo", "torchrun", "torchrun"]
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
