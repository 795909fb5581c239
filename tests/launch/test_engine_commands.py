"""Command lines of engines: GPUs, keys, seeds."""

import itertools
import os
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from asympo_megatron.config import load_config
from asympo_megatron.errors import ConfigError
from asympo_megatron.launch import engines
from asympo_megatron.launch import sglang as launch_sglang
from asympo_megatron.launch.engines import engine_command, engine_environment, engine_seed
from asympo_megatron.launch.sglang import cpu_arguments, find_python

MODEL = Path("model")


@pytest.fixture(autouse=True)
def _with_gpus(monkeypatch):
    monkeypatch.setattr(engines, "on_cpu", lambda: False)


def sglang(tmp_path, *overrides, arguments=()):
    python = f"rollout.engine_python={sys.executable}"
    config = load_config("quickstart", [f"run.root={tmp_path}", "rollout.engine=sglang", python, *overrides])
    config.rollout.engine_args = list(arguments)
    return config


def base_gpus(config, engines):
    """The last --base-gpu-id of each command line, the one that argparse takes; None without any."""
    commands = [engine_command(config, MODEL, 30000 + index, index) for index in range(engines)]
    found = [[after for name, after in itertools.pairwise(line) if name == "--base-gpu-id"] for line in commands]
    return [values[-1] if values else None for values in found]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tp-size", "2", "--base-gpu-id", "4"], ["4", "6", "8"]),
        (["--tp", "2", "--base-gpu-id", "1"], ["1", "3", "5"]),
        (["--tensor-parallel-size=4"], [None, "4", "8"]),
        ([], [None, "1", "2"]),
    ],
)
def test_every_sglang_engine_has_gpus_of_its_own(tmp_path, arguments, expected):
    assert base_gpus(sglang(tmp_path, arguments=arguments), 3) == expected


def test_a_base_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.engine_args: --base-gpu-id is 'auto'; it must be a number"):
        engine_command(sglang(tmp_path, arguments=["--base-gpu-id", "auto"]), MODEL, 30000, 1)


def test_the_key_of_sglang_is_in_a_file_of_its_owner(tmp_path):
    config = sglang(tmp_path)
    key = config.rollout.engine_api_key = 'it\'s "open"'
    old = tmp_path / "quickstart" / "engine_key.yaml"
    old.parent.mkdir()
    old.write_text("api-key: old")
    old.chmod(0o644)
    command = engine_command(config, MODEL, 30000)
    assert command[command.index("--config") + 1] == str(old)
    assert not any(key in argument for argument in command)
    assert OmegaConf.load(old) == {"api-key": key}
    assert old.stat().st_mode & 0o077 == 0
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert "--config" not in engine_command(sglang(tmp_path), MODEL, 30000)


def test_a_server_samples_in_the_precision_of_the_model(tmp_path):
    """SGLang's own choice for a float32 model is float16."""
    for dtype, expected in (("fp32", "float32"), ("bf16", "bfloat16")):
        command = engine_command(sglang(tmp_path, f"model.dtype={dtype}"), MODEL, 30000)
        assert command[:3] == [sys.executable, "-m", "sglang.launch_server"]
        assert command[command.index("--dtype") + 1] == expected


def test_without_a_gpu_servers_get_the_arguments_of_the_cpu_path_and_no_gpu_number(tmp_path, monkeypatch):
    config = sglang(tmp_path, arguments=["--max-running-requests", "8"])
    with_gpu = engine_command(config, MODEL, 30001, 1)
    assert "--base-gpu-id" in with_gpu
    assert "--device" not in with_gpu
    assert "HF_HUB_OFFLINE" not in engine_environment(config)
    monkeypatch.setattr(engines, "on_cpu", lambda: True)
    command = engine_command(config, MODEL, 30001, 1)
    assert command[command.index("--device") + 1] == "cpu"
    assert "--base-gpu-id" not in command
    assert command[-2:] == ["--max-running-requests", "8"], "the user's arguments come last, and win"
    assert engine_environment(config)["HF_HUB_OFFLINE"] == "1"
    tokens = cpu_arguments(1024)
    assert int(tokens[tokens.index("--max-total-tokens") + 1]) == 64 * 1024


def test_the_python_of_the_engines_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch_sglang, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"no environment holds sglang\. Set rollout\.engine_python .*`make sglang-env`"
    ):
        find_python(None)
    monkeypatch.setattr(launch_sglang, "find_spec", lambda _: "found")
    assert find_python(None) == sys.executable
    made = tmp_path / ".venv-sglang" / "bin" / "python"
    made.parent.mkdir(parents=True)
    made.touch()
    assert find_python(None) == str(made), "an environment made for it comes first"
    assert find_python(sys.executable) == sys.executable
    with pytest.raises(ConfigError, match=r"rollout\.engine_python is 'nowhere', which is no file"):
        find_python("nowhere")


def test_no_two_engines_and_no_two_starts_share_a_seed():
    seeds = {engine_seed(run, port, ns) for run in (0, 1) for port in (30000, 30001) for ns in (10**18, 10**18 + 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert engine_seed(0, 30000, 10**18) == engine_seed(0, 30000, 10**18)


def test_the_engine_command_seeds_every_start_anew(tmp_path, monkeypatch):
    import asympo_megatron.engine
    from asympo_megatron.cli.main import main

    started = []
    monkeypatch.setattr(asympo_megatron.engine, "serve", started.append)
    for port in (30000, 30001, 30000):
        assert main(["engine", "quickstart", f"run.root={tmp_path}", f"rollout.engine_port={port}"]) == 0
    assert len({options.seed for options in started}) == 3


def test_the_engine_command_becomes_sglang_where_the_configuration_says_so(tmp_path, monkeypatch):
    from asympo_megatron.cli.main import main

    started = []

    def become(program, command, environment):
        started.append((program, command, environment))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", become)
    ours = [f"run.root={tmp_path}", "rollout.engine=sglang", f"rollout.engine_python={sys.executable}"]
    ours += ["rollout.engine_args=[--tp-size,4,--trust-remote-code]"]
    with pytest.raises(SystemExit):
        main(["engine", "quickstart", *ours, "rollout.engine_port=30007", "--engine-args", "--tp-size", "2"])
    with pytest.raises(SystemExit):
        main(["engine", "quickstart", *ours])
    (program, command, environment), (_, second, _) = started
    assert program == command[0] == sys.executable
    assert command[1:3] == ["-m", "sglang.launch_server"]
    assert command[command.index("--model-path") + 1] == str(tmp_path / "quickstart" / "model")
    assert command[command.index("--port") + 1] == "30007"
    assert command[-5:] == ["--tp-size", "4", "--trust-remote-code", "--tp-size", "2"]
    assert environment.items() >= {**os.environ, "OMP_NUM_THREADS": "1"}.items()
    assert int(second[second.index("--port") + 1]) > 0, "any free one"


@pytest.mark.parametrize(("run_id", "expected"), [(None, 0), ("7", 1)])
def test_only_a_rank_of_torchrun_dies_with_its_parent(monkeypatch, run_id, expected):
    """A trainer started by hand (nohup ... &) must outlive its shell."""
    import asympo_megatron.launch.children
    import asympo_megatron.trainer.run
    from asympo_megatron.cli.main import main

    asked = []
    monkeypatch.setattr(asympo_megatron.launch.children, "die_with_parent", lambda _: asked.append(os.getpid()))
    monkeypatch.setattr(asympo_megatron.trainer.run, "train", lambda *_: None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if run_id is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    assert main(["train", "quickstart"]) == 0
    assert len(asked) == expected


def test_asympo_run_numbers_its_engines(tmp_path, monkeypatch):
    from asympo_megatron.config import RunDir
    from asympo_megatron.launch import supervisor

    class Recorder:
        def __init__(self):
            self.commands = []

        def start(self, role, command, env):
            self.commands.append(command)

    config, children = sglang(tmp_path, "rollout.num_engines=3"), Recorder()
    monkeypatch.setattr(supervisor, "free_port", lambda _: 30000)
    supervisor._start_rollout(config, RunDir.of(config), MODEL, children)
    assert [command[-2:] for command in children.commands[1:3]] == [["--base-gpu-id", "1"], ["--base-gpu-id", "2"]]
