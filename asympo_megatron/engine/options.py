"""Options of one embedded engine."""

from dataclasses import dataclass

from asympo_megatron.errors import EngineError, UnknownNameError

LOAD_FORMATS = ("auto", "dummy")
DTYPES = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class EngineOptions:
    """What an embedded engine serves, and where.

    Args:
        model_path: Hugging Face directory.
        host: address to bind; loopback unless told otherwise.
        port: 0 takes any free port.
        load_format: auto (safetensors of ``model_path``) | dummy (random weights from its config.json alone).
        api_key: every call but ``/health*`` must then carry ``Authorization: Bearer KEY``.
        max_running_requests: rows decoded together; more wait.
        context_length: prompt plus new tokens of a request do not exceed it; None takes the model's.
        dtype: auto (the model's own) | fp32 | bf16.
        seed: of dummy weights and of requests without a ``sampling_seed``.
        threads: of torch on the model thread; None leaves torch's choice.
        group_timeout_s: deadline of joining a trainer's group and of every broadcast in it.
    """

    model_path: str
    host: str = "127.0.0.1"
    port: int = 0
    load_format: str = "auto"
    api_key: str | None = None
    max_running_requests: int = 256
    context_length: int | None = None
    dtype: str = "auto"
    seed: int = 0
    threads: int | None = None
    group_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.load_format not in LOAD_FORMATS:
            raise UnknownNameError("load_format", self.load_format, LOAD_FORMATS)
        if self.dtype not in DTYPES:
            raise UnknownNameError("engine dtype", self.dtype, DTYPES)
        for name in ("max_running_requests", "context_length", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= self.port <= 65535:
            raise EngineError(f"port is {self.port}; expected 0 (any free port) to 65535.")
