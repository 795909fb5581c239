"""`asympo train`: build everything a training run needs, in order, and run the loop."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from asympo_megatron.config import Config, RunDir, history
from asympo_megatron.errors import AsympoError, ConfigError, NonFiniteLossError, PreemptedError
from asympo_megatron.mcore import Checkpoints, Layout, Learner, initialize, shutdown
from asympo_megatron.metrics import MetricsWriter, open_sinks
from asympo_megatron.objectives import Objective, build_objective, penalize_kl
from asympo_megatron.sync.own_folder import OwnFolder, run_label
from asympo_megatron.sync.sender import WeightSender
from asympo_megatron.sync.sharer import WeightSharer
from asympo_megatron.sync.transport import DeltaTransport, DiskTransport, SenderTransport, Transport
from asympo_megatron.tasks import load_task, prepare_model_dir
from asympo_megatron.trainer.client import ControllerClient
from asympo_megatron.trainer.exchange import Exchange
from asympo_megatron.trainer.loop import TrainingLoop
from asympo_megatron.trainer.preemption import Preemption, StopSignals
from asympo_megatron.trainer.publisher import Publisher
from asympo_megatron.trainer.rows import MetricsRows
from asympo_megatron.trainer.sources import ControllerSource, LocalSource, Source

log = logging.getLogger(__name__)

CONTROLLER_START_S = 120.0
"""What a controller may need to start, prompts read and journal opened, on a busy machine."""


def train(config: Config, signals: StopSignals) -> None:
    """Train ``config`` to ``run.steps``, resuming from the newest complete checkpoint of its run directory.

    Raises:
        PreemptedError: asked to stop by a signal; the state is saved and committed.
        AsympoError: see the message; checkpoints and journal are left so that the same command resumes.
    """
    run_dir = RunDir.of(config)
    layout = initialize(config)
    try:
        exchange = Exchange(layout.rank, layout.world_size, layout.dp_rank)
        preemption = Preemption(signals, exchange)
        model_dir = Path(exchange.from_rank0(lambda: str(_prepare(config, run_dir)), str))
        objective = build_objective(config.objective.name, **config.objective.options)
        objective = penalize_kl(objective, config.objective.kl_coef, config.objective.kl_estimator)
        learner = _learner(config, layout, objective, model_dir)
        checkpoints = Checkpoints(run_dir.checkpoints, config.checkpoint.keep_last)
        _load_weights(config, learner, checkpoints)
        source, publisher = _source(config, objective, exchange, preemption, layout, run_dir, model_dir)
        try:
            rows = _rows(config, exchange, run_dir)
            TrainingLoop(config, learner, layout, source, publisher, checkpoints, rows, preemption).run()
        finally:
            if publisher is not None:
                publisher.close()
    except (PreemptedError, NonFiniteLossError):
        shutdown()  # every rank raises these
        raise
    except BaseException:
        # To end NCCL's groups takes all ranks, and the others may know nothing of this error: they wait in some
        # collective until the launcher, which sees this process end, ends them.
        if layout.world_size == 1:
            shutdown()
        raise
    shutdown()


def _prepare(config: Config, run_dir: RunDir) -> Path:
    """The model directory; and, where no `asympo run` has done it, the resolved config beside the metrics."""
    if not run_dir.config.is_file():
        run_dir.create(config)
    return prepare_model_dir(config, run_dir.path)


def _learner(config: Config, layout: Layout, objective: Objective, model_dir: Path) -> Learner:
    hf_config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    return Learner(config, hf_config, objective, layout)


def _load_weights(config: Config, learner: Learner, checkpoints: Checkpoints) -> None:
    """Resume this run, or start it from what model.init names; the reference policy is the same after a resume."""
    newest = checkpoints.newest()
    if newest is not None and not config.checkpoint.resume:
        raise ConfigError(
            f"checkpoint.resume is false, but {checkpoints.root} holds an earlier run's checkpoints. "
            "Set run.name to a new run, or remove that directory."
        )
    needs_reference = "reference" in learner.passes
    if newest is None or needs_reference:
        _load(config, learner, config.model.init)
    if needs_reference:
        reference = config.model.reference
        learner.hold_reference(None if reference is None else lambda: _load(config, learner, reference))
    elif config.model.reference is not None:
        raise ConfigError(
            f"model.reference is {config.model.reference}, but nothing reads a reference policy. "
            "Set objective.kl_coef, or model.reference=null."
        )
    if newest is not None:
        resumed = checkpoints.resume(learner)
        log.info("resumed from %s at step %d", resumed, learner.step_count)


def _load(config: Config, learner: Learner, source: str) -> None:
    """Weights of model.init or model.reference; the learner has drawn random ones already."""
    if source == "hf":
        from asympo_megatron.conversion import load_hf

        assert config.model.path is not None  # validate() saw to it
        load_hf(learner, Path(config.model.path))
    elif source != "random":
        learner.load(Checkpoints.find(Path(source)), weights_only=True)


def _source(
    config: Config,
    objective: Objective,
    exchange: Exchange,
    preemption: Preemption,
    layout: Layout,
    run_dir: RunDir,
    model_dir: Path,
) -> tuple[Source, Publisher | None]:
    rollout = config.rollout
    if rollout.controller_url:
        # The controller waits as long for its engines: it must be the one to give up first and name the engine.
        patience_s = rollout.engine_start_timeout_s + CONTROLLER_START_S
        client, announcing = (
            ControllerClient(rollout.controller_url, rollout.controller_token, patience_s) for _ in range(2)
        )
        publisher = None
        if rollout.source == "engines":
            transport = _transport(config, layout, run_dir, model_dir) if exchange.rank == 0 else None
            publisher = Publisher(config, announcing, exchange, transport)
        return ControllerSource(config, client, exchange, preemption), publisher
    if rollout.source == "engines":
        raise ConfigError(
            "rollout.source=engines needs rollout.controller_url=http://HOST:PORT, the address of `asympo control`. "
            "On one machine `asympo run` starts both."
        )
    task = load_task(config, model_dir) if rollout.source == "supervised" else None
    return LocalSource(config, objective, task), None


def _transport(config: Config, layout: Layout, run_dir: RunDir, model_dir: Path) -> Transport:
    sync = config.sync
    if sync.deltas:
        folder = OwnFolder(sync.spool_dir, f"asympo-trainer-{run_label(run_dir.path)}")
        return DeltaTransport(run_dir.weights, model_dir, sync.keep_last, sync.deltas, folder)
    if sync.transport == "disk":
        return DiskTransport(run_dir.weights, model_dir, sync.keep_last)
    token = config.rollout.controller_token
    if sync.transport == "colocated":
        return SenderTransport(WeightSharer(token, sync.bucket_bytes, sync.spool_dir))
    sender = WeightSender(
        sync.host,
        token,
        backend="nccl" if layout.device.type == "cuda" else "gloo",
        bucket_bytes=sync.bucket_bytes,
        timeout_s=config.rollout.engine_timeout_s,
        folder=sync.spool_dir,
    )
    return SenderTransport(sender)


def _begin(config: Config, run_dir: RunDir, step: int) -> None:
    for change in history.begin(run_dir, config, step):
        log.warning("the configuration changed: from step %d on %s", step, change)


def _rows(config: Config, exchange: Exchange, run_dir: RunDir) -> MetricsRows:
    rows, problem = MetricsRows(None, []), None
    if exchange.rank == 0:
        try:
            sinks = open_sinks(config, run_dir.path)
            rows = MetricsRows(MetricsWriter(run_dir.metrics), sinks, partial(_begin, config, run_dir))
        except AsympoError as error:
            problem = error
    exchange.agree(problem)
    return rows
