"""Prompts in, scored groups out: one task a group, as many as the lag rule admits."""

import logging
from collections.abc import Callable, Sequence

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

from asympo_megatron.config import Config
from asympo_megatron.errors import ControllerError, EpisodeError, RewardError
from asympo_megatron.rollout.admission import LagRule
from asympo_megatron.rollout.answer import SamplingParams, check_prompt
from asympo_megatron.rollout.bell import Background, Bell
from asympo_megatron.rollout.episodes import Episode, Player, all_or_none
from asympo_megatron.rollout.fleet import Fleet
from asympo_megatron.rollout.grading import grade, raw_group
from asympo_megatron.rollout.interfaces import Prompt, Scorer, Task
from asympo_megatron.rollout.ledger import Ledger
from asympo_megatron.rollout.prompts import Prompts
from asympo_megatron.rollout.requester import Draft
from asympo_megatron.rollout.rows import StoredGroup

log = logging.getLogger(__name__)
_SCORE_ATTEMPTS = 3
"""Calls of the scorer, which has retries of its own, before a group is dropped."""
_BATCHES_WITHOUT_GRADIENT = 10
"""Dynamic sampling gives up when so many batches' worth of groups in a row have no gradient."""


class GroupSampler:
    """Starts prompts while the lag rule has slots and brings each to a scored group, or drops it with a reason.

    Args:
        config: of the run.
        task: tokens of the prompts.
        prompts: of the task.
        scorer: rewards.
        ledger: groups and their states.
        rule: the lag rule.
        step: step of the engines' weights; None while no engine serves.
        player: samples responses.
        fleet: told when a group no longer needs its engine.
        bell: rung when a group is ready or dropped.
        background: where the groups' tasks run.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        prompts: Prompts,
        scorer: Scorer,
        ledger: Ledger,
        rule: LagRule,
        step: Callable[[], int | None],
        player: Player,
        fleet: Fleet,
        bell: Bell,
        background: Background,
    ) -> None:
        self._config, self._task, self._prompts, self._scorer = config, task, prompts, scorer
        self._ledger, self._rule, self._step = ledger, rule, step
        self._player, self._fleet = player, fleet
        self._bell, self._background = bell, background
        self._params = sampling_params(config, task)
        self._drops_in_a_row = self._discards_in_a_row = 0

    async def run(self) -> None:
        """Take up the groups of the journal that are in flight, then admit new ones for as long as the run lasts."""
        for group_id, prompt_index in list(self._ledger.groups.in_flight.items()):
            self._start(group_id, prompt_index)
        while True:
            await self._bell.until(lambda: self._slots() > 0)
            for group_id, prompt_index in self._ledger.admit(self._slots()):
                self._start(group_id, prompt_index)

    def _slots(self) -> int:
        step = self._step()
        return 0 if step is None else self._rule.slots(step, self._ledger.groups.live)

    def _start(self, group_id: int, prompt_index: int) -> None:
        self._background.spawn(self._group(group_id, prompt_index), f"group {group_id}")

    async def _group(self, group_id: int, prompt_index: int) -> None:
        prompt = await self._prompts.train(prompt_index)
        prompt_ids = list(prompt.ids)
        check_prompt(prompt_ids, self._task.codec.vocab_size, f"prompt {prompt_index}")
        longest = self._config.rollout.sampling.max_prompt_tokens
        if len(prompt_ids) > longest:
            self._drop(group_id, f"prompt {prompt_index} has {len(prompt_ids)} tokens, max_prompt_tokens is {longest}")
            return
        try:
            answers = await self._sample(group_id, prompt)
        except EpisodeError as error:
            self._drop(group_id, str(error))
            return
        finally:
            self._fleet.forget_group(group_id)
        try:
            rewards = await score(self._scorer, prompt, answers)
        except RewardError as error:
            self._drop(group_id, f"reward of prompt {prompt_index} failed: {error}")
            return
        group = raw_group(group_id, prompt_index, prompt_ids, answers, rewards)
        stored = grade(group, self._config.rollout.sampling, self._config.advantage.estimator)
        self._drops_in_a_row = 0
        if self._config.rollout.dynamic_sampling and not any(stored.advantages):
            self._discard(group_id, stored)
        else:
            self._ledger.finish_group(group_id, stored)
            self._discards_in_a_row = 0
        self._bell.ring()

    async def _sample(self, group_id: int, prompt: Prompt) -> list[Episode]:
        prompt_ids = list(prompt.ids)
        drafts = (
            Draft(group_id, f"{group_id:09d}", row, prompt_ids, self._params)
            for row in range(self._config.batch.group_size)
        )
        return await all_or_none(self._player.play(prompt, draft) for draft in drafts)

    def _drop(self, group_id: int, reason: str) -> None:
        """The slot is free again, and another prompt takes it."""
        log.warning("group %d is dropped: %s", group_id, reason)
        self._ledger.drop(group_id, reason)
        self._drops_in_a_row += 1
        limit = max(16, 2 * self._config.batch.groups_per_step)
        if self._drops_in_a_row >= limit:
            raise ControllerError(f"{limit} groups in a row were dropped, the last because: {reason}")
        self._bell.ring()

    def _discard(self, group_id: int, stored: StoredGroup) -> None:
        """Dynamic sampling: no advantage, no gradient; another prompt takes the slot."""
        rewards = sorted({response.reward for response in stored.group.responses})
        self._ledger.discard(group_id, f"dynamic sampling: no advantage, rewards {rewards}", stored)
        self._discards_in_a_row += 1
        limit = _BATCHES_WITHOUT_GRADIENT * self._config.batch.groups_per_step
        if self._discards_in_a_row >= limit:
            raise ControllerError(
                f"rollout.dynamic_sampling found no advantage in {limit} groups in a row, the last with rewards "
                f"{rewards}: the task is solved, or too hard. Set rollout.dynamic_sampling=false, or change the task."
            )


def sampling_params(config: Config, task: Task) -> SamplingParams:
    """How training responses are sampled."""
    sampling = config.rollout.sampling
    stops = sorted({*task.codec.stop_token_ids, *sampling.stop_token_ids})
    return SamplingParams(sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k, stops)


async def score(scorer: Scorer, prompt: Prompt, answers: Sequence[Episode]) -> list[float]:
    """Rewards of the answers to one prompt.

    Raises:
        RewardError: the scorer failed every time, or returned another number of rewards than it was given answers.
    """
    turns = [answer.last_turn for answer in answers]
    histories = [answer.history for answer in answers if answer.history is not None]
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(RewardError), stop=stop_after_attempt(_SCORE_ATTEMPTS), reraise=True
    ):
        with attempt:
            rewards = await (scorer.score(prompt, turns, histories) if histories else scorer.score(prompt, turns))
            if len(rewards) != len(answers):
                raise RewardError(f"the scorer returned {len(rewards)} rewards for {len(answers)} responses.")
    return rewards
