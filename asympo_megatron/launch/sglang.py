"""The command line of one SGLang server on this machine, with or without a GPU."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from asympo_megatron.errors import ConfigError

CPU_ENVIRONMENT = Path(".venv-sglang") / "bin" / "python"
"""Where `make sglang-env` puts the Python of a CPU-only SGLang, in the working directory."""
_CPU_MAX_RUNNING = 64
_CPU_TOKENS = 16384


@dataclass(frozen=True)
class ServerOptions:
    """What a server serves, and where.

    Args:
        model_dir: Hugging Face directory.
        host, port: where it listens.
        context_length: a request whose prompt and new tokens exceed it is refused.
        dtype: float32 | bfloat16. SGLang's own choice for a float32 model would be float16.
        load_format: auto | dummy (random weights from config.json alone).
        key_file: YAML file with the API key; None for a server without one.
    """

    model_dir: Path
    host: str
    port: int
    context_length: int
    dtype: str
    load_format: str = "auto"
    key_file: Path | None = None


def server_command(python: Path | str, options: ServerOptions, arguments: Sequence[str] = ()) -> list[str]:
    """`python -m sglang.launch_server ...`; of an option given twice, SGLang takes the last.

    Args:
        python: of the environment that holds sglang.
        options: what every server needs.
        arguments: further arguments, after ours.
    """
    command = [str(python), "-m", "sglang.launch_server"]
    if options.key_file is not None:
        command += ["--config", str(options.key_file)]
    command += ["--model-path", str(options.model_dir), "--load-format", options.load_format]
    command += ["--host", options.host, "--port", str(options.port)]
    command += ["--context-length", str(options.context_length), "--dtype", options.dtype]
    return command + list(arguments)


def cpu_arguments(context_length: int) -> list[str]:
    """Arguments that keep a server away from GPU kernels: the text path of dense models."""
    tokens = max(_CPU_TOKENS, _CPU_MAX_RUNNING * context_length)
    return [
        *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--grammar-backend", "none", "--disable-cuda-graph", "--disable-overlap-schedule", "--skip-server-warmup"),
        *("--max-running-requests", str(_CPU_MAX_RUNNING), "--max-total-tokens", str(tokens)),
        *("--mem-fraction-static", "0.3"),
    ]


def on_cpu() -> bool:
    """Whether servers of this machine must do without a GPU."""
    return not torch.cuda.is_available()


def find_python(configured: str | None) -> str:
    """The Python that runs SGLang servers.

    Args:
        configured: rollout.engine_python; null looks for .venv-sglang here, then for sglang beside this package.

    Raises:
        ConfigError: there is none; the message says how to get one.
    """
    if configured is not None:
        if not Path(configured).is_file():
            raise ConfigError(
                f"rollout.engine_python is {configured!r}, which is no file. Name the Python of an environment that "
                "holds sglang."
            )
        return configured
    if CPU_ENVIRONMENT.is_file():
        return str(CPU_ENVIRONMENT.absolute())
    if find_spec("sglang") is not None:
        return sys.executable
    raise ConfigError(
        "rollout.engine=sglang: no environment holds sglang. Set rollout.engine_python to the Python of one "
        "(requirements-rollout-gpu.txt), or on a machine without a GPU run `make sglang-env`."
    )
