"""A small run around a controller: fake engines, a fake task and a fake trainer, all over real HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from patient_loop import PatientLoop

from asympo_megatron import errors, protocol
from asympo_megatron.config import Config, data_hash
from asympo_megatron.rollout import Controller, build_controller
from asympo_megatron.rollout.api import build_app
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.sync import Manifest
from asympo_megatron.sync.manifest import MANIFEST_NAME
from asympo_megatron.testing.fake_engine import FakeEngine

VOCAB = 64


def run_async(work: Coroutine[Any, Any, Any], limit_s: float = 180.0) -> Any:
    """Run a test's coroutine on a patient clock; the limit catches hangs."""

    async def bounded() -> Any:
        async with asyncio.timeout(limit_s):
            return await work

    with asyncio.Runner(loop_factory=PatientLoop) as runner:
        return runner.run(bounded())


@dataclass(frozen=True)
class FakePrompt:
    index: int
    ids: list[int]
    question: str = "q"
    answer: str = "a"
    meta: dict = field(default_factory=dict)


@dataclass
class FakeCodec:
    stop_token_ids: list[int] = field(default_factory=lambda: [1])
    vocab_size: int = VOCAB


class FakeTask:
    """Prompt i is [i % 50, 3, 5]; held-out prompt i is [i % 50, 9]."""

    def __init__(self) -> None:
        self.codec = FakeCodec()
        self.asked: list[int] = []

    def train_prompt(self, index: int) -> FakePrompt:
        self.asked.append(index)
        return FakePrompt(index, [index % 50, 3, 5])

    def eval_prompts(self, limit: int) -> list[FakePrompt]:
        return [FakePrompt(index, [index % 50, 9]) for index in range(limit)]


class FakeScorer:
    """Reward: 1 for every second response of a group."""

    def __init__(self) -> None:
        self.failing: Callable[[FakePrompt], bool] = lambda _: False
        self.calls = 0
        self.told: list[tuple[list[int], list[list[int]], Any]] = []
        """Prompt, last turns and what came before, of every call."""

    async def score(self, prompt: FakePrompt, responses: list[list[int]], histories: Any = None) -> list[float]:
        self.calls += 1
        self.told.append((prompt.ids, responses, histories))
        if self.failing(prompt):
            raise errors.RewardError(f"scorer of prompt {prompt.index} broke.")
        return [float(row % 2) for row in range(len(responses))]

    def metrics(self) -> dict[str, float]:
        return {"reward/junk": float(self.calls)}


def small_config(**changes: Any) -> Config:
    """2 groups a step, 2 responses a group, 6 steps; ``rollout__max_lag_steps=0`` sets nested fields."""
    config = Config()
    config.run.name, config.run.steps = "world", 6
    config.batch.groups_per_step, config.batch.group_size = 2, 2
    config.rollout.sampling.max_new_tokens = 8
    config.rollout.sampling.max_prompt_tokens = 16
    config.rollout.engine_timeout_s = 5.0
    config.rollout.engine_start_timeout_s = 10.0
    config.sync.timeout_s = 10.0
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        target: Any = config
        for parent in parents:
            target = getattr(target, parent)
        assert hasattr(target, leaf), name
        setattr(target, leaf, value)
    return config


class Trainer:
    """The trainer's calls over HTTP."""

    def __init__(self, client: TestClient, config: Config, root: Path, token: str | None = None) -> None:
        self._client, self._config, self.root = client, config, root
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.incarnation = 0
        self.path: Callable[[int], str] = f"{root}/weights/{{}}".format
        """Where a version lies: a directory, made with a manifest alone unless it is there, or an address."""

    async def call(self, path: str, request: Any, kind: Any) -> Any:
        body = msgspec.msgpack.encode(request)
        async with self._client.post(path, data=body, headers=self._headers) as reply:
            content = await reply.read()
            if reply.status == 200:
                return msgspec.msgpack.decode(content, type=kind)
            refused = msgspec.msgpack.decode(content, type=protocol.ErrorReply)
            error = errors.revive(refused.kind, refused.message)
            error.add_note(f"HTTP {reply.status}")
            raise error

    async def attach(self, step: int = 0) -> int:
        request = protocol.AttachRequest(self._config.run.name, data_hash(self._config), step)
        self.incarnation = (await self.call("/attach", request, protocol.AttachReply)).incarnation
        return self.incarnation

    async def publish(self, step: int, checksum: str | None = None) -> int:
        checksum = checksum or f"weights-{step}"
        request = protocol.VersionRequest(self.incarnation, step, checksum)
        reply = await self.call("/version", request, protocol.VersionReply)
        if reply.needed:
            path = self.path(reply.version)
            if "://" not in path and not Path(path).exists():
                Path(path).mkdir(parents=True)
                manifest = Manifest(reply.version, step, checksum, {})
                (Path(path) / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
            publish = protocol.PublishRequest(self.incarnation, step, reply.version, checksum, path)
            await self.call("/publish", publish, protocol.PublishReply)
        return reply.version

    async def lease(self, step: int, wait_s: float = 60.0) -> protocol.LeaseReply:
        return await self.call("/lease", protocol.LeaseRequest(self.incarnation, step, wait_s), protocol.LeaseReply)

    async def payload(self, reply: protocol.LeaseReply) -> list[protocol.Sample]:
        rows = [(response.group_id, response.row) for response in reply.responses]
        request = protocol.PayloadRequest(self.incarnation, reply.step, rows)
        return (await self.call("/payload", request, protocol.PayloadReply)).samples

    async def commit(self, step: int, oldest_step: int = 0) -> None:
        await self.call("/commit", protocol.CommitRequest(self.incarnation, step, oldest_step), dict)

    async def finish(self, step: int) -> protocol.FinishReply:
        return await self.call("/finish", protocol.FinishRequest(self.incarnation, step, 60.0), protocol.FinishReply)


@dataclass
class World:
    """A controller that serves, with its engines and a trainer."""

    config: Config
    controller: Controller
    engines: list[FakeEngine]
    task: FakeTask
    scorer: FakeScorer
    trainer: Trainer
    client: TestClient

    @property
    def groups(self) -> Any:
        return self.controller.parts.ledger.groups

    async def until(self, condition: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Wait for something inside the controller that its bell is rung for."""
        async with asyncio.timeout(limit_s):
            await self.controller.parts.bell.until(condition)


@contextlib.asynccontextmanager
async def world(
    run_dir: Path,
    config: Config | None = None,
    engines: list[FakeEngine] | None = None,
    *,
    scorer: FakeScorer | None = None,
    task: FakeTask | None = None,
    verify: Callable[[VersionRow], object] | None = lambda _: None,
    app: Callable[[Controller], web.Application] | None = None,
    environment: Any = None,
) -> AsyncIterator[World]:
    """Start everything; stop everything. Engines given are started if they are not."""
    config = config or small_config()
    engines = [FakeEngine(VOCAB)] if engines is None else engines
    urls = [await engine.start() for engine in engines]
    task, scorer = task or FakeTask(), scorer or FakeScorer()
    replay = config.rollout.source == "replay"
    controller = build_controller(
        config,
        run_dir,
        None if replay else task,
        None if replay else scorer,
        [] if replay else urls,
        environment=environment,
        verify=verify,
        behavior_logprobs=False,
        backoff_s=0.01,
    )
    server = TestServer(app(controller) if app else build_app(controller, None, lambda: None))
    try:
        async with TestClient(server) as client:
            await controller.start()
            yield World(config, controller, engines, task, scorer, Trainer(client, config, run_dir), client)
    finally:
        await controller.stop()
        for engine in engines:
            await engine.kill()


def installed(w: World, version: int) -> bool:
    """Whether engines serve, all of them this version."""
    fleet = w.controller.parts.fleet
    return bool(fleet.serving) and all(e.weights and e.weights.version == version for e in fleet.serving)


def labels(engine: FakeEngine) -> list[str]:
    """Of the weights that an engine was told to load, in order."""
    return [body["weight_version"] for path, body in engine.calls if path == "/update_weights_from_disk"]


def updates(engine: FakeEngine) -> list[str]:
    """Versions that an engine was told to load, in order."""
    return [label.partition(".")[0] for label in labels(engine)]


def changed(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    """An answer with other top-level fields, or ``meta__x`` fields inside meta_info."""

    def apply(answer: dict[str, Any]) -> Any:
        for name, value in fields.items():
            target = answer["meta_info"] if name.startswith("meta__") else answer
            target[name.removeprefix("meta__")] = value
        return answer

    return apply
