"""What benchmarks of the controller share: prompts without text, coin-flip rewards, and a learner that only waits.

The controller is the real one, with its journal; the learner calls it as a trainer does, without HTTP in between.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from asympo_megatron import protocol
from asympo_megatron.config import Config, data_hash
from asympo_megatron.rollout import Controller

VOCABULARY = 1 << 16
_LEASE_WAIT_S = 30.0


def make_config(name: str, *, groups_per_step: int, group_size: int, steps: int, max_lag_steps: int) -> Config:
    """A run without evaluations; deadlines so long that none matters."""
    config = Config()
    config.run.name, config.run.steps = name, steps
    config.batch.groups_per_step, config.batch.group_size = groups_per_step, group_size
    config.rollout.max_lag_steps = max_lag_steps
    config.rollout.request_timeout_s = 86_400.0
    return config


@dataclass(frozen=True)
class Prompt:
    index: int
    ids: list[int]
    question: str = ""
    answer: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Codec:
    stop_token_ids: tuple[int, ...] = (1,)
    vocab_size: int = VOCABULARY


class CountingTask:
    """Prompt i holds a few tokens that depend on i."""

    def __init__(self, prompt_tokens: int = 4) -> None:
        self.codec, self._prompt_tokens = Codec(), prompt_tokens

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, [(index + k) % VOCABULARY for k in range(self._prompt_tokens)])

    def eval_prompts(self, limit: int) -> list[Prompt]:
        raise NotImplementedError("these runs evaluate nothing")


class CoinScorer:
    """Reward 0 or 1, by the prompt and the row alone."""

    async def score(self, prompt: Prompt, responses: list[list[int]]) -> list[float]:
        coin = random.Random(prompt.index)
        return [float(coin.random() < 0.5) for _ in responses]

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Step:
    """One optimizer step on the loop's clock."""

    leased_s: float
    trained_s: float
    lengths: tuple[int, ...]
    """Tokens of each response."""
    lag_mean: float
    lag_max: int
    over_bound: int
    """Responses above max_lag_steps."""

    @property
    def tokens(self) -> int:
        """Of all its responses."""
        return sum(self.lengths)


class Learner:
    """Leases, reads the tokens, trains (``train()``), publishes, commits: the calls of a trainer, in its order."""

    def __init__(self, controller: Controller, config: Config, train: Callable[[], Coroutine[Any, Any, None]]):
        self._controller, self._config, self._train = controller, config, train
        self._incarnation = 0
        self.steps: list[Step] = []

    async def run(self) -> None:
        """Every step of the run."""
        config, controller = self._config, self._controller
        attached = await controller.attach(protocol.AttachRequest(config.run.name, data_hash(config), 0))
        self._incarnation = attached.incarnation
        await self._publish(0)
        clock = asyncio.get_running_loop().time
        for step in range(config.run.steps):
            lease = await self._lease(step)
            leased_s = clock()
            lengths = await self._read(lease)
            await self._train()
            figures = lease.metrics
            lags = (figures["lag/mean"], int(figures["lag/max"]), int(figures["lag/over_bound"]))
            self.steps.append(Step(leased_s, clock(), lengths, *lags))
            await self._publish(step + 1)
            await controller.commit(protocol.CommitRequest(self._incarnation, step + 1, oldest_step=step + 1))

    async def _lease(self, step: int) -> protocol.LeaseReply:
        while True:
            reply = await self._controller.lease(protocol.LeaseRequest(self._incarnation, step, _LEASE_WAIT_S))
            if reply.ready:
                return reply

    async def _read(self, lease: protocol.LeaseReply) -> tuple[int, ...]:
        rows = [(response.group_id, response.row) for response in lease.responses]
        reply = await self._controller.payload(protocol.PayloadRequest(self._incarnation, lease.step, rows))
        return tuple(len(sample.ids) for sample in reply.samples)

    async def _publish(self, step: int) -> None:
        checksum = f"weights-{step}"
        given = await self._controller.version(protocol.VersionRequest(self._incarnation, step, checksum))
        request = protocol.PublishRequest(self._incarnation, step, given.version, checksum, f"weights/{given.version}")
        await self._controller.publish(request)
