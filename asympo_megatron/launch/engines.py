"""Commands of the engines that `asympo run` starts on this machine."""

import sys
from pathlib import Path

from asympo_megatron.config import Config, RunDir


def engine_command(config: Config, model_dir: Path, port: int) -> list[str]:
    """The command line of one local engine.

    Engines start on random weights ("dummy"): the first published version reaches them before any prompt does.
    """
    if config.rollout.engine == "embedded":
        return asympo_command("engine", str(RunDir.of(config).config), f"rollout.engine_port={port}")
    command = [config.rollout.engine_python or sys.executable, "-m", "sglang.launch_server"]
    command += ["--model-path", str(model_dir), "--load-format", "dummy"]
    command += ["--host", config.rollout.engine_host, "--port", str(port)]
    command += ["--context-length", str(context_length(config))]
    if config.rollout.engine_api_key:
        command += ["--api-key", config.rollout.engine_api_key]
    return command + list(config.rollout.engine_args)


def context_length(config: Config) -> int:
    """What an engine must be able to hold; a server refuses prompt + max_new_tokens that reach its context length."""
    sampling = config.rollout.sampling
    return sampling.max_prompt_tokens + sampling.max_new_tokens + 1


def asympo_command(*arguments: str) -> list[str]:
    """`asympo ARGUMENTS` under this very Python."""
    return [sys.executable, "-m", "asympo_megatron.cli.main", *arguments]


def trainer_command(config: Config, *overrides: str) -> list[str]:
    """The trainer: torchrun when it has several ranks, a plain process when it has one."""
    parallel = config.parallel
    ranks = config.run.local_ranks or parallel.tensor * parallel.pipeline * parallel.context
    arguments = ["train", str(RunDir.of(config).config), *overrides]
    if ranks == 1:
        return asympo_command(*arguments)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, "-m", "asympo_megatron.cli.main", *arguments]
