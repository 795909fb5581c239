"""Putting a controller together, and running it."""

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web

from asympo_megatron.config import Config, RunDir, data_hash
from asympo_megatron.errors import AsympoError, ConfigError, ControllerError
from asympo_megatron.rollout.admission import LagRule
from asympo_megatron.rollout.answer import run_prefix
from asympo_megatron.rollout.api import build_app
from asympo_megatron.rollout.bell import Background, Bell
from asympo_megatron.rollout.client import EngineClient
from asympo_megatron.rollout.collective import Collective
from asympo_megatron.rollout.colocated import Colocated
from asympo_megatron.rollout.controller import Controller
from asympo_megatron.rollout.episodes import Player
from asympo_megatron.rollout.evaluator import Evaluator
from asympo_megatron.rollout.fleet import Fleet
from asympo_megatron.rollout.install import SyncOptions
from asympo_megatron.rollout.interfaces import Environment, Scorer, Task
from asympo_megatron.rollout.journal import Journal
from asympo_megatron.rollout.ledger import Ledger
from asympo_megatron.rollout.mirrored import Mirrored
from asympo_megatron.rollout.parts import Parts
from asympo_megatron.rollout.prompts import Prompts
from asympo_megatron.rollout.published import targets_of, verify_version
from asympo_megatron.rollout.replay import ReplaySampler
from asympo_megatron.rollout.requester import Requester
from asympo_megatron.rollout.router import Router, RouterClient
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.rollout.sampler import GroupSampler
from asympo_megatron.rollout.syncer import Syncer

log = logging.getLogger(__name__)
_FAILURE_TOLD_S = 5.0
"""How long a failed controller stays up so that the trainer hears why."""


def build_controller(
    config: Config,
    run_dir: Path,
    task: Task | None,
    scorer: Scorer | None,
    engine_urls: Sequence[str] = (),
    *,
    environment: Environment | None = None,
    verify: Callable[[VersionRow], object] | None = None,
    connect: Callable[[str], EngineClient] | None = None,
    behavior_logprobs: bool | None = None,
    backoff_s: float = 0.5,
) -> Controller:
    """A controller on the journal of a run, not started yet. Needs a running event loop.

    Args:
        config: a checked configuration with rollout.source engines or replay.
        run_dir: holds journal.sqlite, unless rollout.journal_dir names another directory.
        task, scorer: prompts and rewards; None for replay.
        engine_urls: engines to begin with.
        environment: replies to the model's turns, where task.environment names one.
        verify: checks the files of a published version; by default against their manifest.
        connect: makes the client of an engine from its url; by default one over HTTP.
        behavior_logprobs: ask engines for log-probs; by default when the objective needs them.
        backoff_s: first pause after an engine failed.

    Raises:
        ConfigError: an empty rollout.controller_token.
        JournalError: the journal is in use, or belongs to another run.
        RecordError: the replay file is missing or malformed.
    """
    token = config.rollout.controller_token
    if token is not None and not token.strip():  # often an environment variable that is not set
        raise ConfigError("rollout.controller_token is empty: set a token, or null for a controller without one.")
    directory = Path(config.rollout.journal_dir or run_dir)
    journal = Journal(RunDir(directory).journal, config.run.name, data_hash(config))
    given = (task, scorer, environment)
    try:
        return _assemble(config, journal, given, engine_urls, verify, connect, behavior_logprobs, backoff_s)
    except BaseException:
        journal.close()
        raise


def _assemble(
    config: Config,
    journal: Journal,
    given: tuple[Task | None, Scorer | None, Environment | None],
    engine_urls: Sequence[str],
    verify: Callable[[VersionRow], object] | None,
    connect: Callable[[str], EngineClient] | None,
    behavior_logprobs: bool | None,
    backoff_s: float,
) -> Controller:
    task, scorer, environment = given
    rollout, bell, ledger = config.rollout, Bell(), Ledger(journal)
    background = Background(bell)
    policy = "admission" if rollout.source == "replay" else rollout.lag_policy
    rule = LagRule(config.batch.groups_per_step, rollout.max_lag_steps, config.run.steps, policy)
    routed = rollout.router_url is not None
    fleet = Fleet(rollout.max_in_flight_per_engine, config.batch.group_size, bell, routed=routed)
    targets = targets_of(config, journal, ledger)
    common = (config, data_hash(config), journal, ledger, rule, fleet, targets, bell, background)
    if rollout.source == "replay":
        return Controller(Parts(*common, ReplaySampler(config, ledger, rule, bell), None, None, None, None), [])
    if rollout.source != "engines" or task is None or scorer is None:
        raise ConfigError(f"rollout.source={rollout.source} needs no controller. Set rollout.controller_url=null.")
    if (environment is None) != (config.task.environment is None):
        raise ConfigError(
            f"task.environment is {config.task.environment}, but the controller was given "
            f"{'no' if environment is None else 'an'} environment. Make it with tasks.build_environment(config, task)."
        )

    def may_sample(group_id: int) -> bool:
        step = fleet.step
        return step is not None and rule.may_sample(step, ledger.groups.position(group_id))

    run = run_prefix(config.run.name)
    router = _router(config, fleet)
    requester = Requester(
        fleet,
        bell,
        may_sample,
        ledger.versions,
        task.codec.vocab_size,
        lambda: (run, journal.incarnation),
        logprobs=_needs_logprobs(config) if behavior_logprobs is None else behavior_logprobs,
        router=router,
    )
    syncer = Syncer(
        fleet,
        targets,
        _sync_options(config, backoff_s),
        verify or verify_version,
        connect or _connector(config),
        bell,
        background,
        router,
    )
    player = Player(requester, environment, config.task.max_turns)
    told = (config, task, Prompts(task), scorer)
    sampler = GroupSampler(*told, ledger, rule, lambda: fleet.step, player, fleet, bell, background)
    evaluator = Evaluator(*told, player, fleet, targets, journal, bell)
    return Controller(Parts(*common, sampler, syncer, requester, evaluator, scorer, router), list(engine_urls))


async def serve_controller(
    config: Config,
    run_dir: Path,
    task: Task | None,
    scorer: Scorer | None,
    engine_urls: Sequence[str] = (),
    *,
    host: str,
    port: int,
    environment: Environment | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Run the controller until SIGTERM, SIGINT or cancellation.

    Args:
        config, run_dir, task, scorer, engine_urls, environment: see :func:`build_controller`.
        host, port: where to listen; port 0 takes any.
        on_ready: called with the url once calls are answered.

    Raises:
        ControllerError: the port is in use, or background work failed; a waiting trainer was told why.
    """
    controller = build_controller(config, run_dir, task, scorer, engine_urls, environment=environment)
    told, stopped = asyncio.Event(), asyncio.Event()
    runner = web.AppRunner(build_app(controller, config.rollout.controller_token, told.set), access_log=None)
    try:
        await runner.setup()
        url = await _listen(runner, host, port)
        await controller.start()
        log.info("controller of run %s at %s", config.run.name, url)
        if on_ready is not None:
            on_ready(url)
        await _until_stopped(controller, told, stopped)
    finally:
        await runner.cleanup()
        await controller.stop()


async def _listen(runner: web.AppRunner, host: str, port: int) -> str:
    site = web.TCPSite(runner, host, port, shutdown_timeout=1.0)
    try:
        await site.start()
    except OSError as error:
        raise ControllerError(
            f"the controller cannot listen on {host}:{port} ({error.strerror}). Set rollout.controller_port to a free "
            "port, or 0 for any."
        ) from error
    return f"http://{host}:{runner.addresses[0][1]}"


async def _until_stopped(controller: Controller, told: asyncio.Event, stopped: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    waits = [asyncio.create_task(controller.wait_failed()), asyncio.create_task(stopped.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        failure = controller.failure
        if failure is not None:
            try:
                await asyncio.wait_for(told.wait(), _FAILURE_TOLD_S)
            except TimeoutError:
                log.warning("no trainer asked within %g s why the controller failed", _FAILURE_TOLD_S)
            if isinstance(failure, AsympoError):
                raise failure
            raise ControllerError(f"the controller failed: {type(failure).__name__}: {failure}") from failure
    finally:
        for wait in waits:
            wait.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _sync_options(config: Config, backoff_s: float) -> SyncOptions:
    rollout, sync = config.rollout, config.sync
    prefix, token = run_prefix(config.run.name), rollout.controller_token
    reached = (prefix, token, rollout.engine_timeout_s)
    return SyncOptions(
        run_prefix=prefix,
        pause_mode=sync.pause_mode,
        timeout_s=sync.timeout_s,
        start_timeout_s=rollout.engine_start_timeout_s,
        silence_s=rollout.engine_timeout_s,
        collective=Collective(*reached),
        colocated=Colocated(*reached),
        mirrored=Mirrored(prefix, token, sync.mirror_port, sync.timeout_s) if sync.deltas else None,
        local_only=sync.transport == "colocated",
        backoff_s=backoff_s,
    )


def _connector(config: Config) -> Callable[[str], EngineClient]:
    rollout = config.rollout
    return lambda url: EngineClient(
        url, rollout.engine_api_key, rollout.request_timeout_s, control_timeout_s=rollout.engine_timeout_s
    )


def _router(config: Config, fleet: Fleet) -> Router | None:
    rollout = config.rollout
    if rollout.router_url is None:
        return None
    deadlines = (rollout.request_timeout_s, rollout.engine_timeout_s)
    client = RouterClient(rollout.router_url, rollout.engine_api_key, *deadlines, fleet)
    return Router(client, fleet, rollout.engine_start_timeout_s)


def _needs_logprobs(config: Config) -> bool:
    from asympo_megatron.objectives import build_objective  # imports torch: only when nobody said

    return "behavior_logprob_T" in build_objective(config.objective.name, **config.objective.options).needs
