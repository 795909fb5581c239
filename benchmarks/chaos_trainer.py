"""The small trainer of a chaos run: the real loop, client, publisher and checkpoint keeping around a learner without a
model. Its weights are a hash of everything it was trained on."""

import hashlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from chaos_points import Points
from chaos_world import World, matches, prompt_index

from asympo_megatron.errors import EXIT_REQUEUE, AsympoError, CheckpointError, PreemptedError
from asympo_megatron.mcore import Checkpoints, Row
from asympo_megatron.mcore.marker import MARKER, write_marker
from asympo_megatron.metrics import MetricsWriter
from asympo_megatron.sync import disk
from asympo_megatron.sync.transport import DiskTransport
from asympo_megatron.trainer import publisher as publisher_module
from asympo_megatron.trainer.client import ControllerClient
from asympo_megatron.trainer.exchange import Exchange
from asympo_megatron.trainer.loop import TrainingLoop
from asympo_megatron.trainer.preemption import Preemption, StopSignals
from asympo_megatron.trainer.publisher import Publisher
from asympo_megatron.trainer.rows import MetricsRows
from asympo_megatron.trainer.sources import ControllerSource

GATE, STATE = "gate", "state.json"
PATIENCE_S = 120.0
PIERCED: tuple[tuple[Any, str, str], ...] = (
    (ControllerClient, "attach", "attach"),
    (ControllerClient, "lease", "lease"),
    (ControllerClient, "payload", "payload"),
    (ControllerClient, "version", "version"),
    (ControllerClient, "publish", "publish"),
    (ControllerClient, "commit", "commit"),
    (DiskTransport, "store", "store"),
    (DiskTransport, "keep", "prune_weights"),
    (Checkpoints, "_prune", "prune"),
    (MetricsRows, "write", "row"),
)


class HashLearner:
    """Weights are 32 bytes: the hash of the weights before and of what the step was trained on.

    ``trained`` lists the groups of every step behind the weights and is saved with them, so the last checkpoint says
    what the run was trained on in the end, steps done again included once.
    """

    passes: tuple[str, ...] = ()
    plan = SimpleNamespace(facts=SimpleNamespace(hidden_size=8))

    def __init__(self, world: World, points: Points) -> None:
        self._world, self._points = world, points
        self.step_count = 0
        self.incarnation = 0
        self.trained: list[list[int]] = []
        self._weights = hashlib.sha256(b"start").digest()

    def checksum(self) -> str:
        return self._weights.hex()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "weights", torch.tensor(list(self._weights), dtype=torch.uint8)

    def step(self, microbatches: list[list[Row]], responses: int) -> dict[str, float]:
        gate = self._world.path / GATE
        while self.step_count >= int(gate.read_text()):
            time.sleep(0.01)
        rows = [row for batch in microbatches for row in batch]
        groups = sorted({prompt_index(row.prompt_ids) for row in rows})
        self._check(rows, groups, responses)
        self._points.reach("step:middle")
        told = [(row.prompt_ids, row.ids, row.mask, row.advantage) for row in rows]
        self._weights = hashlib.sha256(self._weights + json.dumps(told).encode()).digest()
        self.trained.append(groups)
        self.step_count += 1
        self._points.note(
            "trained",
            step=self.step_count,
            incarnation=self.incarnation,
            groups=groups,
            checksum=self.checksum(),
        )
        return {"tokens": float(sum(len(row.ids) for row in rows))}

    def _check(self, rows: list[Row], groups: list[int], responses: int) -> None:
        """Every response is whole, and the one that belongs here."""
        found = sorted((prompt_index(row.prompt_ids), row.ids[0]) for row in rows)
        expected = [(group, row) for group in groups for row in range(self._world.group_size)]
        wrong = [row.ids for row in rows if not matches(row.ids, prompt_index(row.prompt_ids), row.ids[0])]
        if found != expected or len(groups) != self._world.groups_per_step or responses != len(rows) or wrong:
            self._points.note("corrupt", step=self.step_count, groups=groups, wrong=wrong[:3])

    def state(self) -> str:
        """What a checkpoint holds."""
        return json.dumps({"step": self.step_count, "weights": self.checksum(), "trained": self.trained})

    def load(self, directory: Path) -> None:
        state = json.loads((directory / STATE).read_text())
        self.step_count, self.trained = state["step"], state["trained"]
        self._weights = bytes.fromhex(state["weights"])


class HashCheckpoints(Checkpoints):
    """The run's checkpoints, written without Megatron: a temporary directory, a marker that says it is complete, one
    rename. In the background, as there, everything up to the rename."""

    def __init__(self, root: Path, keep_last: int, points: Points) -> None:
        super().__init__(root, keep_last)
        self._points = points
        self._begun_step: int | None = None
        self._writer: threading.Thread | None = None
        self._problem: OSError | None = None

    def begin(self, learner: Any, *, background: bool) -> None:
        self._begun_step, self._problem = learner.step_count, None
        if not (self._directory / MARKER).is_file():
            self._clear(self._directory)
            self._temporary = self._directory.with_name(f"{self._directory.name}.{secrets.token_hex(4)}.tmp")
            self._writer = threading.Thread(target=self._write, args=(learner.state(), learner.checksum()))
            self._writer.start()
            if not background:
                self._writer.join()

    @property
    def pending(self) -> bool:
        return self._begun_step is not None

    def ready(self, *, wait: bool) -> bool:
        if wait and self._writer is not None:
            self._writer.join()
        return self._writer is None or not self._writer.is_alive()

    def complete(self) -> Any:
        """Name the checkpoint and remove the oldest.

        Raises:
            CheckpointError: it could not be written.
        """
        directory, step, written = self._directory, self._begun_step, self._writer is not None
        self._begun_step = self._writer = None
        if written:
            try:
                if self._problem is not None:
                    raise self._problem
                os.rename(self._temporary, directory)
                disk.fsync(directory.parent)
            except OSError as error:
                raise CheckpointError(f"{directory} could not be written: {error}") from error
        self._points.reach("save:renamed")
        return SimpleNamespace(step=step, oldest_step=self._prune())

    @property
    def _directory(self) -> Path:
        return self.root / f"step_{self._begun_step:06d}"

    def _write(self, state: str, checksum: str) -> None:
        temporary = self._temporary
        try:
            temporary.mkdir(parents=True)
            (temporary / STATE).write_text(state)
            disk.fsync(temporary / STATE)
            self._points.reach("save:unmarked")
            write_marker(temporary, {"format": 2, "step": self._begun_step, "checksum": checksum})
            self._points.reach("save:marked")
        except OSError as error:
            self._problem = error


def mutate(mutant: str) -> None:
    """Break the product on purpose: the verdict must notice."""
    if mutant == "early_commit":  # the commit goes out before the checkpoint is written

        def checkpoint(self: TrainingLoop) -> None:
            step = self._learner.step_count
            self._source.commit(step, step)
            self._checkpoints.save(self._learner)

        TrainingLoop._checkpoint = checkpoint  # type: ignore[method-assign]


def run_trainer(world: World) -> None:
    """Resume from the newest checkpoint and train to the last step; exits with the code of a trainer."""
    points = Points(world.path, "trainer")
    for owner, name, point in PIERCED:
        points.pierce(owner, name, point)
    points.pierce(disk, "fsync", "fsync")
    mutate(world.mutant)
    torch.set_num_threads(1)
    with StopSignals() as signals:
        code, why = 0, ""
        try:
            _train(world, points, signals)
        except PreemptedError:
            code = EXIT_REQUEUE
        except AsympoError as error:
            code, why = 1, f"{type(error).__name__}: {error}"
        points.note("exit", code=code, why=why)
        print(why, flush=True)
        sys.exit(code)


def _train(world: World, points: Points, signals: StopSignals) -> None:
    config, run_dir = world.config(), world.run_dir
    learner = HashLearner(world, points)
    publisher_module.export_hf = lambda held: held.tensors()
    checkpoints = HashCheckpoints(run_dir.checkpoints, config.checkpoint.keep_last, points)
    newest = checkpoints.newest()
    if newest is not None:
        learner.load(newest)
    exchange = Exchange(rank=0, world_size=1, dp_rank=0)
    preemption = Preemption(signals, exchange)
    client = ControllerClient(world.controller_url, None, PATIENCE_S)
    source = _Source(config, client, exchange, preemption, learner, points)
    transport = DiskTransport(run_dir.weights, world.path / "model", config.sync.keep_last)
    publisher = Publisher(config, ControllerClient(world.controller_url, None, PATIENCE_S), exchange, transport)
    layout: Any = SimpleNamespace(dp_size=1, dp_rank=0, pad_multiple=1, pack_multiple=1)
    rows = MetricsRows(MetricsWriter(run_dir.metrics), [])
    loop_learner: Any = learner
    TrainingLoop(config, loop_learner, layout, source, publisher, checkpoints, rows, preemption).run()


class _Source(ControllerSource):
    """Tells the learner and the events which incarnation this is."""

    def __init__(self, config: Any, client: Any, exchange: Any, preemption: Any, learner: HashLearner, points: Points):
        super().__init__(config, client, exchange, preemption)
        self._learner, self._points = learner, points

    def attach(self, resumed_step: int) -> None:
        super().attach(resumed_step)
        self._learner.incarnation = self.incarnation
        self._points.note("attached", incarnation=self.incarnation, step=resumed_step)
