"""The controller of a chaos run: the real one, with points around what it does."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from chaos_points import Points
from chaos_world import NumberedTask, World

from asympo_megatron.errors import AsympoError
from asympo_megatron.rollout import serve_controller
from asympo_megatron.rollout.client import EngineClient
from asympo_megatron.rollout.controller import Controller
from asympo_megatron.rollout.journal import Journal
from asympo_megatron.rollout.ledger import Ledger
from asympo_megatron.tasks.items import Prompt
from asympo_megatron.tasks.methods import Pooled
from asympo_megatron.tasks.rewards import Scorer
from asympo_megatron.tasks.workers import WorkerSpec

PIERCED: tuple[tuple[Any, str, str], ...] = (
    (Ledger, "admit", "admit"),
    (EngineClient, "generate", "sample"),
    (Scorer, "score", "score"),
    (Journal, "finish_group", "finish_group"),
    (Journal, "drop", "drop"),
    (Journal, "lease", "lease"),
    (Journal, "payload", "payload"),
    (Journal, "attach", "attach"),
    (Journal, "commit", "commit"),
    (Journal, "allocate_version", "version"),
    (Journal, "publish", "publish"),
    (EngineClient, "pause", "pause"),
    (EngineClient, "update_weights", "load"),
    (EngineClient, "resume", "resume"),
)


class Judge(Pooled):
    """Scores in fenced workers, as for any reward that looks into model output."""

    def job(self, prompt: Prompt, text: str) -> dict[str, Any]:
        return {"arguments": [text, prompt.answer, prompt.meta["bait"]]}

    def reference_job(self, prompt: Prompt) -> dict[str, Any]:
        return self.job(prompt, prompt.answer)


def pierce(points: Points) -> None:
    """Put the points into the classes of this process."""
    for owner, name, point in PIERCED:
        points.pierce(owner, name, point)
    inner = Journal._transaction

    @contextlib.contextmanager
    def transaction(self: Journal, *, durable: bool = False) -> Iterator[None]:
        with inner(self, durable=durable):
            yield
            points.reach("journal:uncommitted")

    Journal._transaction = transaction  # type: ignore[method-assign]


def mutate(mutant: str) -> None:
    """Break the product on purpose: the verdict must notice."""
    if mutant == "forgetful_lease":  # a resumed trainer is given other groups for the steps it does again
        attach = Ledger.attach

        def forget(self: Ledger, resumed_step: int) -> int:
            incarnation = attach(self, resumed_step)
            for step in [step for step in self.groups.leases if step >= resumed_step]:
                del self.groups.leases[step]
            self.groups.next_step = resumed_step
            return incarnation

        Ledger.attach = forget  # type: ignore[method-assign]
    elif mutant == "no_fence":
        Controller._check = lambda *_: None  # type: ignore[method-assign]


def run_controller(world: World) -> None:
    """Until SIGTERM, or its own end."""
    points = Points(world.path, "controller")
    pierce(points)
    mutate(world.mutant)
    config = world.config()
    task = NumberedTask(world.bait)
    scorer = Scorer(task.codec, Judge(WorkerSpec("function", {"target": "chaos_reward:judge"}), config.task))

    async def serve() -> None:
        try:
            await serve_controller(
                config,
                world.run_dir.path,
                task,
                scorer,
                world.engine_urls,
                host="127.0.0.1",
                port=world.controller_port,
                on_ready=lambda _: points.note("listening"),
            )
        finally:
            await scorer.close()

    try:
        asyncio.run(serve())
    except AsympoError as error:
        points.note("exit", code=1, why=f"{type(error).__name__}: {error}")
        raise
