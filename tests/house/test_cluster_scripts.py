"""Scripts of examples/slurm and examples/bare, with stand-ins for Slurm and for the roles: who is told what."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from asympo_megatron.config import load_config

ROOT = Path(__file__).parents[2]


def run(world, *command, **env):
    folder, base = world
    subprocess.run(command, cwd=folder, env={**base, **env}, check=True, timeout=60, capture_output=True)
    return [shlex.split(line) for line in (folder / "recorded").read_text().splitlines()]


def test_slurm_jobs_find_each_other_by_url(world):
    more = {"ENGINES": "3", "GPUS_PER_ENGINE": "2", "TRAIN_NODES": "2", "ASYMPO_TOKEN": "sesame"}
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "my_run", **more)
    engines, (controller, *trainers), (cancel,) = calls[:3], calls[3:6], calls[6:]
    for port, engine in enumerate(engines, start=10042):
        assert engine[:3] == ["asympo", "engine", "some.yaml"]
        assert {"run.name=my_run", "rollout.engine_host=0.0.0.0", f"rollout.engine_port={port}"} <= set(engine)
        assert engine[-5:] == ["--engine-args", "--base-gpu-id", "0", "--tp-size", "2"]
    assert controller[:3] == ["asympo", "control", "some.yaml"]
    assert "run.name=my_run" in controller
    assert "rollout.engine_urls=[http://host7:10042,http://host7:10043,http://host7:10044]" in controller
    assert "rollout.controller_port=20042" in controller
    for rank, trainer in enumerate(trainers):
        assert {"--nnodes=2", f"--node-rank={rank}", "--master-addr=n1", "--nproc-per-node=8"} <= set(trainer)
        assert {"run.name=my_run", "rollout.controller_url=http://host7:20042"} <= set(trainer)
    assert cancel == ["scancel", "engine.sbatch-id", "controller.sbatch-id"]


def test_overrides_reach_every_role_and_rank_0_sends_from_its_own_host(world):
    given = ["sync.transport=collective", "task.path=my data/$HOME"]
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "r", *given, ENGINES="1")
    engine, controller, *trainers = calls[:4]
    for call in (engine, controller, *trainers):
        assert set(given) <= set(call)
        assert not any(argument.startswith("sync.mirror") for argument in call)
    assert ["sync.host=n1" in call for call in calls[:4]] == [False, False, True, True]
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "r", "sync.host=ib0", ENGINES="1")
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
elif [[ $* == *engine_port=10045* ]]; then
  touch "$RECORDED.last"
fi
"""
    )
    more = {"ENGINES": "4", "MIRROR_PORT": "8701"}
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "my_run", "sync.deltas=8", **more)
    mirrors = [call for call in calls if call[0] == "mirror"]
    assert len(mirrors) == 4
    for call in mirrors:
        assert call[1] == "some.yaml"
        assert {"sync.mirror_host=0.0.0.0", "sync.mirror_port=8701", "sync.deltas=8", "run.name=my_run"} <= set(call)
        assert "rollout.controller_token=${oc.env:ASYMPO_TOKEN}" in call


def test_secrets_stay_off_the_command_lines(world):
    secrets = {"ASYMPO_TOKEN": "sesame", "ASYMPO_ENGINE_KEY": "it's open"}
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "r", **secrets)
    assert not any(secret in str(calls) for secret in secrets.values())
    told = [call for call in calls if "rollout.controller_token=${oc.env:ASYMPO_TOKEN}" in call]
    assert [call[0] for call in told] == ["asympo", "asympo", "asympo", "trainer_python", "trainer_python"]
    assert all("rollout.engine_api_key=${oc.env:ASYMPO_ENGINE_KEY}" in call for call in told)


@pytest.mark.parametrize("name", ["qwen3_4b_math", "llama3p2_3b_math"])
def test_sglang_serves_what_the_configuration_names(world, name):
    folder, _ = world
    (folder / "bin" / "asympo").write_text(f'#!/bin/sh\nexec {sys.executable} -m asympo_megatron.cli.main "$@"\n')
    path = f"examples/configs/{name}.yaml"
    config = load_config(ROOT / path)
    model = folder / config.model.path
    model.mkdir(parents=True)
    for file in ("config.json", "tokenizer.json"):
        (model / file).write_text("{}")
    more = {"CONFIG": path, "OVERRIDES": "rollout.sampling.max_new_tokens=100", "ASYMPO_ENGINE_KEY": "it's open"}
    (command,) = run(world, "examples/bare/engine.sh", "30005", "4,6", "run.name=other", PYTHONPATH=str(ROOT), **more)
    assert command[:3] == ["sglang_python", "-m", "sglang.launch_server"]
    last = dict(itertools.pairwise(command))  # of an option given twice, SGLang takes the last
    assert last["--model-path"] == config.model.path
    assert last["--dtype"] == "bfloat16"
    assert last["--load-format"] == "dummy"
    assert last["--context-length"] == str(config.rollout.sampling.max_prompt_tokens + 101)
    assert (last["--host"], last["--port"]) == ("127.0.0.1", "30005")
    assert (last["--tp-size"], last["--base-gpu-id"], last["--mem-fraction-static"]) == ("2", "0", "0.85")
    assert "it's open" not in str(command)
    key_file = folder / last["--config"]
    assert key_file == folder / "runs" / "other" / "engine_key.yaml"
    assert OmegaConf.load(key_file) == {"api-key": "it's open"}
    assert key_file.stat().st_mode & 0o077 == 0


def test_slurm_jobs_get_secrets_that_nobody_set(world):
    folder, _ = world
    with (folder / "bin" / "asympo").open("a") as stand_in:
        stand_in.write('echo "$ASYMPO_TOKEN $ASYMPO_ENGINE_KEY" >"$RECORDED.secrets"\n')
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "r", ENGINES="1")
    controller, *trainers = calls[1:4]
    for call in (controller, *trainers):
        assert "rollout.controller_token=${oc.env:ASYMPO_TOKEN}" in call
        assert "rollout.engine_api_key=${oc.env:ASYMPO_ENGINE_KEY}" in call
    said = (folder / "recorded.secrets").read_text()
    assert re.fullmatch("([0-9a-f]{32}) ([0-9a-f]{32})\n", said)
    assert len(set(said.split())) == 2
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


STOP = ["scancel", "engine.sbatch-id", "controller.sbatch-id"]


@pytest.mark.parametrize(
    ("code", "state", "expected"),
    [
        ("75", "RUNNING", ["scontrol", "requeue", "70042"]),
        ("75", "COMPLETING", None),  # Slurm requeued or cancelled it: the job that waits for its end knows
        ("1", "COMPLETING", None),
        ("1", "RUNNING", STOP),
        ("0", "RUNNING", STOP),
    ],
)
def test_a_trainer_stops_its_servers_where_its_end_is_the_end_of_its_job(world, code, state, expected):
    folder, env = world
    more = {"TRAINER_EXIT": code, "STATE": state}
    command = ["examples/slurm/submit.sh", "some.yaml", "r"]
    subprocess.run(command, cwd=folder, env={**env, **more}, check=True, timeout=60, capture_output=True)
    assert (folder / "recorded.exit").read_text() == f"{code}\n", "of the trainer's job"
    last = shlex.split((folder / "recorded").read_text().splitlines()[-1])
    assert last == expected if expected else last[0] == "trainer_python"


def run_trainer_job(world, **env):
    """One trainer job by itself; the controller has said where it is when the job has waited twice."""
    folder, base = world
    sleep = folder / "bin" / "sleep"
    sleep.write_text(
        """#!/usr/bin/env bash
mkdir "$RECORDED.slept" 2>/dev/null || echo http://c0:20008 >"$RENDEZVOUS/controller.url"
"""
    )
    sleep.chmod(0o700)
    job = {
        "RENDEZVOUS": str(folder),
        "ROLES": str(folder / "examples" / "bare"),
        "SERVERS": "7 8",
        "CONTROLLER_JOB": "8",
        "GPUS_PER_NODE": "8",
        "SLURM_JOB_ID": "9",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "32",
    }
    command = ["bash", "examples/slurm/trainer.sbatch"]
    all_of_it = {**base, **job, **env}
    done = subprocess.run(command, cwd=folder, env=all_of_it, check=False, timeout=60, capture_output=True, text=True)
    return done, [shlex.split(line) for line in (folder / "recorded").read_text().splitlines()]


@pytest.mark.parametrize("queue", [{"QUEUE": "7_0 7_1 8 9"}, {}], ids=["listed", "no answer"])
def test_a_trainer_waits_for_a_controller_whose_job_may_still_run(world, queue):
    done, (*trainers, cancel) = run_trainer_job(world, **queue)
    assert done.returncode == 0, done.stderr
    assert all("rollout.controller_url=http://c0:20008" in trainer for trainer in trainers)
    assert cancel == ["scancel", "7", "8"]


@pytest.mark.parametrize("queue", ["7_0 7_1 9", "7_8 80 9", ""])
def test_a_trainer_whose_controller_is_gone_does_not_wait_on(world, queue):
    done, calls = run_trainer_job(world, QUEUE=queue)
    assert done.returncode == 1
    assert "the controller (job 8) ended before it served" in done.stderr
    assert calls == [["scancel", "7", "8"]]


def test_each_job_is_told_of_the_jobs_before_it(world):
    (world[0] / "bin" / "sbatch").write_text(
        """#!/usr/bin/env bash
script=${*: -1}
echo "${script##*/} ${ENGINES_JOB:-none} ${CONTROLLER_JOB:-none}" >>"$RECORDED"
echo "${script##*/}-id"
"""
    )
    calls = run(world, "examples/slurm/submit.sh", "some.yaml", "r")
    assert ["controller.sbatch", "engine.sbatch-id", "none"] in calls
    assert ["trainer.sbatch", "engine.sbatch-id", "controller.sbatch-id"] in calls


def test_a_job_that_waits_for_the_end_of_the_trainer_stops_what_still_serves(world):
    folder, _ = world
    run(world, "examples/slurm/submit.sh", "some.yaml", "r")
    options = dict(line.split("=", 1) for line in (folder / "recorded.waiting").read_text().splitlines() if "=" in line)
    assert options["--dependency"] == "afterany:trainer.sbatch-id"
    assert run(world, "sh", "-c", options["--wrap"])[-1] == [
        "scancel",
        "--quiet",
        "engine.sbatch-id",
        "controller.sbatch-id",
    ]
    (folder / "bin" / "scancel").write_text("#!/usr/bin/env bash\nexit 1\n")  # all of them are gone
    run(world, "sh", "-c", options["--wrap"])


ALL = ["engine.sbatch-id", "controller.sbatch-id", "trainer.sbatch-id"]


@pytest.mark.parametrize(
    ("refused", "cancelled"),
    [("engine.sbatch", 0), ("controller.sbatch", 1), ("trainer.sbatch", 2), ("--wrap", 3)],
)
def test_a_job_that_slurm_refuses_takes_the_others_with_it(world, refused, cancelled):
    folder, env = world
    more = {"REFUSED": refused}
    command = ["examples/slurm/submit.sh", "some.yaml", "r"]
    done = subprocess.run(command, cwd=folder, env={**env, **more}, check=False, timeout=60, capture_output=True)
    assert done.returncode == 1
    recorded = folder / "recorded"
    last = shlex.split(recorded.read_text().splitlines()[-1]) if recorded.exists() else None
    assert last == (["scancel", *ALL[:cancelled]] if cancelled else None)


@pytest.mark.parametrize(("shown", "used"), [({"CUDA_VISIBLE_DEVICES": "4,5"}, "4,5"), ({}, "0,1")])
def test_an_engine_has_the_gpus_that_slurm_gave_it(world, shown, used):
    folder, _ = world
    (folder / "bin" / "asympo").write_text('#!/usr/bin/env bash\necho "$CUDA_VISIBLE_DEVICES" >"$RECORDED"\n')
    job = {"RENDEZVOUS": str(folder), "ROLES": str(folder / "examples" / "bare"), "GPUS_PER_ENGINE": "2"}
    job |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "42", **shown}
    assert run(world, "bash", "examples/slurm/engine.sbatch", **job) == [[used]]
