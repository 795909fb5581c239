"""What each command does. Imports are local: `asympo report` must not load Megatron, `asympo control` no model."""

import argparse
import asyncio
import logging
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from asympo_megatron.config import Config, RunDir, load_config, override_config

if TYPE_CHECKING:
    from asympo_megatron.tasks import Environment, Scorer, Task


def run(arguments: argparse.Namespace) -> int:
    from asympo_megatron.launch.supervisor import run_local
    from asympo_megatron.metrics import write_report

    config = _load(arguments)
    path = run_local(config, say=lambda line: print(line, flush=True))
    print(f"report: {write_report(path)}")
    return 0


def train(arguments: argparse.Namespace) -> int:
    from asympo_megatron.trainer.preemption import StopSignals

    with StopSignals() as signals:
        from asympo_megatron.launch.children import die_with_parent
        from asympo_megatron.trainer.run import train as train_run

        # torchrun that is killed leaves its ranks behind. `asympo run` asks at the fork; a hand-started trainer lives
        # on. SIGTERM would ask for one more step and a checkpoint.
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent(signal.SIGKILL)
        train_run(_load(arguments), signals)
    return 0


def control(arguments: argparse.Namespace) -> int:
    from asympo_megatron.rollout.collector import collect_rarely
    from asympo_megatron.tasks import build_environment, build_scorer, load_task, prepare_model_dir

    config = _load(arguments)
    task = scorer = environment = None
    if config.rollout.source == "engines":
        task = load_task(config, prepare_model_dir(config, RunDir.of(config).path))
        scorer, environment = build_scorer(config, task), build_environment(config, task)
    collect_rarely()
    asyncio.run(_control(config, task, scorer, environment))
    return 0


async def _control(
    config: Config, task: "Task | None", scorer: "Scorer | None", environment: "Environment | None"
) -> None:
    from asympo_megatron.rollout import serve_controller

    rollout = config.rollout
    try:
        await serve_controller(
            config,
            RunDir.of(config).path,
            task,
            scorer,
            rollout.engine_urls,
            host=rollout.controller_host,
            port=rollout.controller_port,
            environment=environment,
        )
    finally:
        for user_code in (scorer, environment):
            if user_code is not None:
                await user_code.close()


def engine(arguments: argparse.Namespace) -> int:
    from asympo_megatron.tasks import prepare_model_dir

    config = _load(arguments)
    model_dir = prepare_model_dir(config, RunDir.of(config).path)
    if config.rollout.engine == "sglang":
        config.rollout.engine_args += arguments.engine_args
        _become_sglang(config, model_dir)
    _serve_embedded(config, model_dir)
    return 0


def _become_sglang(config: Config, model_dir: Path) -> NoReturn:
    """In the place of this process, so that whoever started it holds the server itself."""
    from asympo_megatron.launch.engines import engine_command, engine_environment
    from asympo_megatron.launch.ports import free_port

    port = config.rollout.engine_port or free_port(config.rollout.engine_host)
    command = engine_command(config, model_dir, port)
    os.execve(command[0], command, {**os.environ, **engine_environment(config)})


def _serve_embedded(config: Config, model_dir: Path) -> None:
    from asympo_megatron.engine import EngineOptions, serve
    from asympo_megatron.launch.engines import context_length, engine_seed

    rollout = config.rollout
    serve(
        EngineOptions(
            model_path=str(model_dir),
            host=rollout.engine_host,
            port=rollout.engine_port,
            load_format="dummy",
            api_key=rollout.engine_api_key,
            max_running_requests=rollout.max_in_flight_per_engine,
            context_length=context_length(config),
            dtype=config.model.dtype,
            seed=engine_seed(config.run.seed, rollout.engine_port, time.time_ns()),
        )
    )


def mirror(arguments: argparse.Namespace) -> int:
    from asympo_megatron.launch.mirror import serve_mirror

    serve_mirror(_load(arguments))
    return 0


def report(arguments: argparse.Namespace) -> int:
    from asympo_megatron.metrics import write_report

    print(write_report(arguments.run_dir))
    return 0


def journal(arguments: argparse.Namespace) -> int:
    from asympo_megatron.rollout import describe_journal

    print(describe_journal(arguments.run_dir))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from asympo_megatron.launch.doctor import describe_machine, describe_run

    print(describe_machine())
    if arguments.config and Path(arguments.config).is_dir():
        _describe_model(Path(arguments.config), arguments.overrides)
    elif arguments.config:
        print(describe_run(_load(arguments)))
    return 0


def _describe_model(directory: Path, overrides: list[str]) -> None:
    from asympo_megatron.conversion import read_config
    from asympo_megatron.launch.model_report import describe_model

    base = Config()
    base.model.path = str(directory)
    print(describe_model(override_config(base, overrides), read_config(directory)))


def _load(arguments: argparse.Namespace) -> Config:
    config = load_config(arguments.config, arguments.overrides)
    logging.getLogger().setLevel(config.logging.level)
    return config
