"""`asympo run`: every role of one run on this machine, supervised.

    warm start (optional) -> engines + controller + trainer -> report

One role dying stops all with its last words and a non-zero exit; Ctrl-C stops all; on SIGTERM or SIGUSR1 the trainer
first finishes its step and saves. Nothing is left behind.
"""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from asympo_megatron.config import Config, RunDir, data_hash, history, load_config, warm_start_config
from asympo_megatron.errors import EXIT_REQUEUE, ConfigError, PreemptedError
from asympo_megatron.launch.children import Child, ChildDiedError, Children, death_notice
from asympo_megatron.launch.engines import (
    ROLE_ENV,
    asympo_command,
    engine_command,
    engine_environment,
    trainer_command,
)
from asympo_megatron.launch.lock import RunLock
from asympo_megatron.launch.ports import check_host, check_port, free_port
from asympo_megatron.launch.sglang import find_python
from asympo_megatron.metrics import RunConsole
from asympo_megatron.objectives import build_objective
from asympo_megatron.tasks import prepare_model_dir

_POLL_S = 0.2


def run_local(config: Config, say: Callable[[str], None]) -> Path:
    """Run a configuration to its end on this machine.

    Args:
        config: a checked configuration; ``rollout.engine_urls`` set means that engines already run elsewhere.
        say: receives one-line messages for the person at the terminal.

    Returns:
        The run directory.

    Raises:
        ChildDiedError: a role ended too early; everything else has been stopped.
        PreemptedError: stopped by SIGTERM or SIGUSR1; the same call resumes the run.
    """
    run_dir = RunDir.of(config)
    first = warm_start_config(config)
    preflight(config)
    if first is not None:
        preflight(first)
    lock = RunLock(run_dir)
    try:
        with _StopSignals() as stop:
            overrides = [] if first is None else [f"model.init={_warm_start(first, say, stop)}"]
            with history.proposed(run_dir, config) as changes:
                for change in changes:
                    say(f"the configuration of {config.run.name} changed: {change}")
                _run_roles(config, run_dir, prepare_model_dir(config, run_dir.path), say, overrides, stop)
    finally:
        lock.release()
    return run_dir.path


def preflight(config: Config) -> None:
    """Refuse what a role would refuse only after another has worked for a while.

    Raises:
        ConfigError: unknown objective or option, a missing model.init, no sglang to start, a host or port to listen on
            that cannot be had.
    """
    build_objective(config.objective.name, **config.objective.options)
    init, rollout = config.model.init, config.rollout
    if init not in ("random", "hf") and not Path(init).is_dir():
        raise ConfigError(f"model.init is {init!r}, which is no directory. Name a checkpoint, or set random or hf.")
    if rollout.source == "supervised":
        return
    check_host(rollout.controller_host, "rollout.controller_host")
    if rollout.controller_port:
        check_port(rollout.controller_host, rollout.controller_port, "rollout.controller_port")
    if rollout.source == "engines" and not rollout.engine_urls:
        check_host(rollout.engine_host, "rollout.engine_host")
        if config.sync.deltas:
            check_host(config.sync.mirror_host, "sync.mirror_host")
        if rollout.engine == "sglang":
            find_python(rollout.engine_python)


def _warm_start(config: Config, say: Callable[[str], None], stop: "_StopSignals") -> Path:
    """Complete the run that comes first; returns its checkpoints. Already complete: nothing is done.

    Raises:
        ConfigError: a warm start with other options lies there.
    """
    run_dir = RunDir.of(config)
    if run_dir.config.is_file() and _decides_weights(load_config(run_dir.config)) != _decides_weights(config):
        raise ConfigError(
            f"{run_dir.path} holds a warm start made with other options. Set run.name to a new run, or remove "
            f"{run_dir.path.parent}."
        )
    if not run_dir.checkpoint(config.run.steps).is_dir():
        say(f"warm start: {config.run.steps} supervised steps ({run_dir.path})")
        run_dir.create(config)
        _run_roles(config, run_dir, prepare_model_dir(config, run_dir.path), say, [], stop)
    return run_dir.checkpoints


def _decides_weights(config: Config) -> tuple[object, ...]:
    """What a warm start's weights depend on."""
    return (
        data_hash(config),
        config.model,
        config.optimizer,
        config.objective,
        config.run.steps,
        config.rollout.label_noise,
    )


def _run_roles(
    config: Config,
    run_dir: RunDir,
    model_dir: Path,
    say: Callable[[str], None],
    overrides: Sequence[str],
    stop: "_StopSignals",
) -> None:
    children = Children(run_dir.logs)
    try:
        if config.rollout.source != "supervised":
            overrides = [*overrides, *_start_rollout(config, run_dir, model_dir, children)]
        # SIGTERM would ask it to finish its step; a kill does no harm, for a checkpoint is whole or absent
        trainer = children.start("trainer", trainer_command(config, *overrides), ROLE_ENV, stop_signal=signal.SIGKILL)
        stop.trainer = trainer
        with RunConsole(config, run_dir.path) as console:
            _watch(children, trainer, console)
        say(f"trained to step {config.run.steps}")
    finally:
        children.stop()
        stop.trainer = None


def _start_rollout(config: Config, run_dir: RunDir, model_dir: Path, children: Children) -> list[str]:
    """Start engines and controller; returns the overrides that tell the trainer where they are."""
    rollout, where = config.rollout, list[str]()
    urls = list(rollout.engine_urls)
    if rollout.source == "engines" and not urls:
        environment = engine_environment(config)
        where += _start_mirror(config, run_dir, children)
        for index in range(rollout.num_engines):
            port = free_port(rollout.engine_host)
            children.start(f"engine{index}", engine_command(config, model_dir, port, index), environment)
            urls.append(f"http://{rollout.engine_host}:{port}")
    port = rollout.controller_port or free_port(rollout.controller_host)
    where += [f"rollout.controller_port={port}", f"rollout.engine_urls=[{','.join(urls)}]"]
    children.start("controller", asympo_command("control", str(run_dir.config), *where), ROLE_ENV)
    return [f"rollout.controller_url=http://{rollout.controller_host}:{port}"]


def _start_mirror(config: Config, run_dir: RunDir, children: Children) -> list[str]:
    """Start what makes deltas whole for the engines of this machine, if there are any; returns where it is."""
    if not config.sync.deltas:
        return []
    where = [f"sync.mirror_port={config.sync.mirror_port or free_port(config.sync.mirror_host)}"]
    children.start("mirror", asympo_command("mirror", str(run_dir.config), *where), ROLE_ENV)
    return where


def _watch(children: Children, trainer: Child, console: RunConsole) -> None:
    """Return when the trainer has finished; raise as soon as any role ends otherwise."""
    while True:
        code = trainer.process.poll()
        if code == 0:
            children.forget(trainer)
            console.update()
            return
        if code in (EXIT_REQUEUE, -signal.SIGUSR1):  # killed while it was still loading Python: nothing to save
            raise PreemptedError(f"the trainer has saved and stopped; {trainer.log} says at which step.")
        if code is not None:
            raise ChildDiedError(death_notice(trainer, code))
        children.check()
        console.update()
        time.sleep(_POLL_S)


class _StopSignals:
    """Inside, SIGTERM and SIGUSR1 (a batch system's notice) reach the trainer, which saves and ends with EXIT_REQUEUE.

    Without a trainer there is nothing to save: the run ends at once.
    """

    def __init__(self) -> None:
        self.trainer: Child | None = None
        self._ending = False

    def __enter__(self) -> "_StopSignals":
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._pass_on) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, *_: object) -> None:
        if self.trainer is not None:
            self.trainer.process.send_signal(signal.SIGUSR1)
        elif not self._ending:  # a second signal must not interrupt the clean-up
            self._ending = True
            raise PreemptedError("asked to stop before training began. The same command resumes the run.")
