"""Where the groups of a step come from: the controller, or a file or task that the trainer reads itself."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from asympo_megatron import protocol
from asympo_megatron.advantages import compute_advantages, min_responses
from asympo_megatron.config import Config, data_hash
from asympo_megatron.errors import RecordError
from asympo_megatron.objectives import Objective
from asympo_megatron.records import Group, read_groups
from asympo_megatron.tasks import Task, supervised_groups
from asympo_megatron.trainer.client import ControllerClient
from asympo_megatron.trainer.exchange import Exchange
from asympo_megatron.trainer.preemption import Preemption

Rows = list[tuple[int, int]]


class Source(Protocol):
    """attach -> lease(s) -> samples(s) ... fence -> commit(s) -> finish. Collective: every rank makes every call.

    ``lease`` calls ``idle`` while it waits, on all ranks alike. ``fence`` raises StaleIncarnationError where another
    trainer has taken the run over: it comes before anything is written that a replacement reads.
    """

    incarnation: int

    def attach(self, resumed_step: int) -> None: ...

    def lease(self, step: int, idle: Callable[[], None]) -> protocol.LeaseReply: ...

    def samples(self, step: int, rows: Rows) -> list[protocol.Sample]: ...

    def fence(self) -> None: ...

    def commit(self, step: int, oldest_step: int) -> None: ...

    def finish(self, step: int) -> list[protocol.Evaluation]: ...


class ControllerSource:
    """Groups leased from the controller: rank 0 leases, the first rank of each replica fetches its own tokens.

    Its waits end with PreemptedError once the run has been asked to stop.
    """

    def __init__(self, config: Config, client: ControllerClient, exchange: Exchange, preemption: Preemption) -> None:
        self._config, self._client, self._exchange, self._preemption = config, client, exchange, preemption
        self.incarnation = 0

    def attach(self, resumed_step: int) -> None:
        request = protocol.AttachRequest(self._config.run.name, data_hash(self._config), resumed_step)
        reply = self._exchange.from_rank0(lambda: self._client.attach(request), protocol.AttachReply)
        self.incarnation = reply.incarnation
        self._fence = protocol.CommitRequest(self.incarnation, resumed_step, oldest_step=0)

    def fence(self) -> None:
        """A repeated commit changes nothing, and is refused once a replacement has attached."""
        self._exchange.from_rank0(lambda: self._client.commit(self._fence), None)

    def lease(self, step: int, idle: Callable[[], None] = lambda: None) -> protocol.LeaseReply:
        """Blocks until the batch is complete. Every poll is shared: a rank that waits longer runs into a time-out."""
        figures: list[protocol.Evaluation] = []
        while True:
            reply = self._exchange.from_rank0(lambda: self._client.lease(self.incarnation, step), protocol.LeaseReply)
            figures += reply.evaluations
            if reply.ready:
                return msgspec.structs.replace(reply, evaluations=figures)
            self._preemption.check()
            idle()

    def samples(self, step: int, rows: Rows) -> list[protocol.Sample]:
        request = protocol.PayloadRequest(self.incarnation, step, rows)
        return self._exchange.from_replica(lambda: self._client.payload(request), list[protocol.Sample])

    def commit(self, step: int, oldest_step: int) -> None:
        request = protocol.CommitRequest(self.incarnation, step, oldest_step)
        self._exchange.from_rank0(lambda: self._client.commit(request), None)

    def finish(self, step: int) -> list[protocol.Evaluation]:
        figures: list[protocol.Evaluation] = []
        while True:
            reply = self._exchange.from_rank0(lambda: self._client.finish(self.incarnation, step), protocol.FinishReply)
            figures += reply.evaluations
            if reply.done:
                return figures
            self._preemption.check()


class LocalSource:
    """Groups that every rank can make itself, step by step: a replay file or a task's reference answers.

    Everything is a function of the step, so a resumed run sees the same groups.
    """

    def __init__(self, config: Config, objective: Objective, task: Task | None) -> None:
        self._config = config
        self._task = task
        self._replay: list[Group] = []
        if config.rollout.source == "replay":
            assert config.rollout.replay is not None  # validate() saw to it
            self._replay = list(
                read_groups(
                    config.rollout.replay,
                    min_responses=min_responses(config.advantage.estimator),
                    max_tokens=config.batch.max_tokens_per_microbatch,
                    behavior_logprobs="behavior_logprob_T" in objective.needs,
                )
            )
            if not self._replay:
                raise RecordError(f"replay file {config.rollout.replay} holds no group.")
        self._groups: dict[int, Group] = {}
        self.incarnation = 0

    def attach(self, resumed_step: int) -> None:
        """Nothing to take over: the groups depend on the step alone."""

    def lease(self, step: int, idle: Callable[[], None]) -> protocol.LeaseReply:
        groups = self._groups_of(step)
        self._groups = {group.group_id: group for group in groups}
        responses = [row for group in groups for row in manifest_of(group, self._config.advantage.estimator)]
        rewards = [row.reward for row in responses]
        return protocol.LeaseReply(True, step, responses, {"reward/mean": sum(rewards) / len(rewards)})

    def samples(self, step: int, rows: Rows) -> list[protocol.Sample]:
        return [sample_of(self._groups[group_id], row) for group_id, row in rows]

    def fence(self) -> None:
        """Nobody leases from a file."""

    def commit(self, step: int, oldest_step: int) -> None:
        """The file is the journal."""

    def finish(self, step: int) -> list[protocol.Evaluation]:
        return []

    def _groups_of(self, step: int) -> list[Group]:
        if self._task is not None:
            return supervised_groups(self._config, self._task, step)
        size = self._config.batch.groups_per_step
        return [self._replay[(step * size + k) % len(self._replay)] for k in range(size)]


def manifest_of(group: Group, estimator: str) -> list[protocol.LeasedResponse]:
    """The manifest rows of a group that is trained at once (lag 0), with advantages on the complete group."""
    advantages = compute_advantages([response.reward for response in group.responses], estimator)
    return [
        protocol.LeasedResponse(
            group_id=group.group_id,
            row=row,
            prompt_tokens=len(group.prompt_ids),
            response_tokens=len(response.ids),
            trained_tokens=response.trained_tokens,
            advantage=advantage,
            reward=response.reward,
            lag=0,
        )
        for row, (response, advantage) in enumerate(zip(group.responses, advantages, strict=True))
    ]


def sample_of(group: Group, row: int) -> protocol.Sample:
    """The tokens of one response of a group."""
    response = group.responses[row]
    return protocol.Sample(group.prompt_ids, response.ids, response.mask, response.versions, response.behavior_logprobs)
