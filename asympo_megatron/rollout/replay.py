"""Groups from a file instead of engines, through the same journal, admission and leases."""

from pathlib import Path

import msgspec

from asympo_megatron.advantages import compute_advantages, min_responses
from asympo_megatron.config import Config
from asympo_megatron.errors import RecordError
from asympo_megatron.records import Group, read_groups
from asympo_megatron.rollout.admission import LagRule
from asympo_megatron.rollout.bell import Bell
from asympo_megatron.rollout.ledger import Ledger
from asympo_megatron.rollout.rows import StoredGroup


class ReplaySampler:
    """Serves the groups of ``rollout.replay`` in order; after the last one the first comes again.

    Rewards and masks are taken as recorded (``rollout.sampling.overlong`` was applied when they were sampled) and
    advantages are computed by ``advantage.estimator``. The weight versions of the recording belong to another run, so
    replayed groups have none and their lag is 0.

    Raises:
        RecordError: the file is missing, malformed or empty.
    """

    def __init__(self, config: Config, ledger: Ledger, rule: LagRule, bell: Bell) -> None:
        path = Path(config.rollout.replay or "")
        from asympo_megatron.objectives import build_objective  # imports torch, which other controllers do without

        objective = build_objective(config.objective.name, **config.objective.options)
        recorded = read_groups(
            path,
            min_responses=min_responses(config.advantage.estimator),
            max_tokens=config.batch.max_tokens_per_microbatch,
            behavior_logprobs="behavior_logprob_T" in objective.needs,
        )
        self._groups = [_without_versions(group) for group in recorded]
        if not self._groups:
            raise RecordError(f"replay file {path} holds no group. Set rollout.replay to a JSONL file of groups.")
        self._config, self._ledger, self._rule, self._bell = config, ledger, rule, bell

    async def run(self) -> None:
        """Keep as many groups ready as the lag rule allows ahead of the trainer."""
        for group_id, index in list(self._ledger.groups.in_flight.items()):
            self._serve(group_id, index)
        while True:
            await self._bell.until(lambda: self._slots() > 0)
            for group_id, index in self._ledger.admit(self._slots()):
                self._serve(group_id, index)

    def _slots(self) -> int:
        return self._rule.slots(self._ledger.groups.next_step, self._ledger.groups.live)

    def _serve(self, group_id: int, index: int) -> None:
        recorded = self._groups[index % len(self._groups)]
        group = msgspec.structs.replace(recorded, group_id=group_id, prompt_index=index)
        rewards = [response.reward for response in group.responses]
        advantages = compute_advantages(rewards, self._config.advantage.estimator)
        self._ledger.finish_group(group_id, StoredGroup(group, advantages))
        self._bell.ring()


def _without_versions(group: Group) -> Group:
    responses = [msgspec.structs.replace(response, versions=[]) for response in group.responses]
    return msgspec.structs.replace(group, responses=responses)
