"""Commands of the roles that run on this machine, started by `asympo run` or one by one."""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from asympo_megatron.config import Config, RunDir
from asympo_megatron.errors import ConfigError
from asympo_megatron.launch.sglang import ServerOptions, cpu_arguments, find_python, on_cpu, server_command

ROLE_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def engine_command(config: Config, model_dir: Path, port: int, index: int = 0) -> list[str]:
    """The command line of one local engine.

    Engines start on random weights ("dummy"): the first published version reaches them before any prompt does.
    SGLang reads its key from a file in the run directory, written here: every user can see a command line.

    Args:
        index: of this engine among ``rollout.num_engines``; each SGLang engine gets GPUs of its own.
    """
    if config.rollout.engine == "embedded":
        return asympo_command("engine", str(RunDir.of(config).config), f"rollout.engine_port={port}")
    rollout, length = config.rollout, context_length(config)
    options = ServerOptions(
        model_dir,
        rollout.engine_host,
        port,
        length,
        dtype=_DTYPES[config.model.dtype],
        load_format="dummy",
        key_file=_key_file(RunDir.of(config), rollout.engine_api_key) if rollout.engine_api_key else None,
    )
    device = cpu_arguments(length) if on_cpu() else []
    arguments = [*device, *rollout.engine_args, *([] if device else _own_gpus(rollout.engine_args, index))]
    return server_command(find_python(rollout.engine_python), options, arguments)


def engine_environment(config: Config) -> dict[str, str]:
    """What the environment of a local engine needs beside the supervisor's."""
    if config.rollout.engine == "sglang" and on_cpu():
        return {**ROLE_ENV, "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return dict(ROLE_ENV)


def engine_seed(run_seed: int, port: int, started_ns: int) -> int:
    """Seed of an embedded engine's unseeded sampling.

    It differs between engines and between starts of one engine: they must not draw the same responses again. So
    asynchronous sampling is not reproducible; it never was, for what is batched together depends on timing.
    """
    digest = hashlib.sha256(f"{run_seed} {port} {started_ns}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _key_file(run_dir: RunDir, key: str) -> Path:
    path = run_dir.path / "engine_key.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # for its owner alone; an old one may have more readers
    with os.fdopen(descriptor, "w") as file:
        file.write(f"api-key: {json.dumps(key)}\n")
    Path(temporary).replace(path)  # whole at any time: engines of other hosts start from it, too
    return path


def _own_gpus(arguments: Sequence[str], index: int) -> list[str]:
    """Engine i starts i tensor-parallel sizes after the first; of an option given twice, SGLang takes the last."""
    if index == 0:
        return []
    first = _number(arguments, ("--base-gpu-id",), default=0)
    size = _number(arguments, ("--tp-size", "--tensor-parallel-size", "--tp"), default=1)
    return ["--base-gpu-id", str(first + index * size)]


def _number(arguments: Sequence[str], names: tuple[str, ...], default: int) -> int:
    """The value of an option, as `--name 4` or `--name=4`."""
    value = str(default)
    for position, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        if name in names:
            value = text if equals else "".join(arguments[position + 1 : position + 2])
    if not value.isdecimal():
        raise ConfigError(f"rollout.engine_args: {names[0]} is {value!r}; it must be a number.")
    return int(value)


def context_length(config: Config) -> int:
    """What an engine must be able to hold; with one token to spare."""
    sampling = config.rollout.sampling
    return sampling.max_prompt_tokens + sampling.max_new_tokens + 1


def asympo_command(*arguments: str) -> list[str]:
    """`asympo ARGUMENTS` under this very Python."""
    return [sys.executable, "-m", "asympo_megatron.cli.main", *arguments]


def trainer_command(config: Config, *overrides: str) -> list[str]:
    """The trainer: a plain process when it has one rank, under torchrun when it has several."""
    parallel = config.parallel
    ranks = config.run.local_ranks or parallel.tensor * parallel.pipeline * parallel.context
    arguments = ["train", str(RunDir.of(config).config), *overrides]
    if ranks == 1:
        return asympo_command(*arguments)
    launcher = ["-m", "asympo_megatron.launch.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, "-m", "asympo_megatron.cli.main", *arguments]
