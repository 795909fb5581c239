"""Where else metrics go: TensorBoard, Weights & Biases, Prometheus. metrics.jsonl stays the record.

The packages are optional and imported only when ``logging.sinks`` names them.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from asympo_megatron.config import Config
from asympo_megatron.errors import ConfigError, UnknownNameError
from asympo_megatron.metrics.secrets import without_secrets


class Sink(Protocol):
    """Takes the rows of metrics.jsonl as they are written; a step may come again with an evaluation added."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Scalars under RUN_DIR/tensorboard."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        module = _import("torch.utils.tensorboard", sink="tensorboard")
        self._news = _News()
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in self._news.of(row).items():
            self._writer.add_scalar(name, value, global_step=row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One Weights & Biases run a run directory: its id is kept there, so that a resumed trainer continues it."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        module = _import("wandb", sink="wandb")
        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.is_file() else None
        self._run = module.init(
            project="asympo_megatron",
            name=config.run.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=asdict(without_secrets(config)),
        )
        id_file.write_text(self._run.id)
        # An evaluation joins its step later, which wandb's own step counter refuses: "step" is the axis instead.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._news = _News()

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({"step": row["step"], **self._news.of(row)})

    def close(self) -> None:
        self._run.finish()


class PrometheusSink:
    """Gauges at http://logging.prometheus_host:prometheus_port/metrics, e.g. ``asympo_reward_mean``."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._client = _import("prometheus_client", sink="prometheus")
        self._registry = self._client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._news = _News()
        host, port = config.logging.prometheus_host, config.logging.prometheus_port
        try:
            self._server, self._thread = self._client.start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise ConfigError(
                f"logging.prometheus_port is {port}, but {host}:{port} cannot be opened ({error.strerror}). "
                "Set another port, or take prometheus out of logging.sinks."
            ) from error

    @property
    def port(self) -> int:
        """The port that is served (the one chosen, when 0 was asked for)."""
        return self._server.server_port

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in self._news.of(row).items():
            if name not in self._gauges:
                metric = "asympo_" + "".join(c if c.isalnum() else "_" for c in name)
                self._gauges[name] = self._client.Gauge(metric, name, registry=self._registry)
            self._gauges[name].set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


SINKS: dict[str, Callable[[Config, Path], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "prometheus": PrometheusSink,
}


def open_sinks(config: Config, run_dir: str | Path) -> list[Sink]:
    """The sinks that ``logging.sinks`` names, opened.

    Raises:
        UnknownNameError: a sink that does not exist.
        ConfigError: its package is not installed, or its port is taken.
    """
    for name in config.logging.sinks:
        if name not in SINKS:
            raise UnknownNameError("sink in logging.sinks", name, SINKS)
    return [SINKS[name](config, Path(run_dir)) for name in config.logging.sinks]


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row; strings, lists, nulls and the step itself left out."""
    numbers = {k: v for k, v in row.items() if isinstance(v, Real) and not isinstance(v, bool) and k != "step"}
    return {name: float(value) for name, value in numbers.items()}


class _News:
    """What a row says that an earlier row of its step did not, so that a rewritten row draws no point twice."""

    def __init__(self) -> None:
        self._step = -1

    def of(self, row: Mapping[str, Any]) -> dict[str, float]:
        found = scalars(row)
        if row["step"] <= self._step:
            return {name: value for name, value in found.items() if name.startswith("eval/")}
        self._step = row["step"]
        return found


def _import(module: str, sink: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"logging.sinks names {sink!r}, but its package cannot be imported ({error}). "
            f"Install it with: pip install 'asympo-megatron[{sink}]', or take it out of logging.sinks."
        ) from error
