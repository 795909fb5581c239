"""Held-out accuracy of a pinned weight version."""

import asyncio
import logging
import time
from dataclasses import dataclass

import msgspec

from asympo_megatron.config import Config
from asympo_megatron.errors import ControllerError, EpisodeError, RewardError
from asympo_megatron.protocol import Evaluation
from asympo_megatron.rollout.answer import SamplingParams, check_prompt
from asympo_megatron.rollout.bell import Bell
from asympo_megatron.rollout.episodes import Episode, Player, all_or_none
from asympo_megatron.rollout.fleet import Fleet
from asympo_megatron.rollout.interfaces import Prompt, Scorer, Task
from asympo_megatron.rollout.journal import Journal
from asympo_megatron.rollout.prompts import Prompts
from asympo_megatron.rollout.requester import Draft
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.rollout.sampler import sampling_params, score
from asympo_megatron.rollout.targets import Targets

log = logging.getLogger(__name__)
_MAX_SAMPLES = 16
"""Tries to get one answer from the pinned version alone."""


def evaluation_due(config: Config, step: int) -> bool:
    """Whether weights of ``step`` are evaluated: every ``eval.interval_steps``, step 0 and the last one."""
    interval = config.rollout.eval.interval_steps
    return interval > 0 and (step % interval == 0 or step == config.run.steps)


@dataclass(frozen=True)
class _Judged:
    """What one held-out prompt contributes: rewards and lengths of sampled answers, rewards of greedy ones."""

    rewards: list[float]
    greedy: list[float]
    tokens: list[int]


class Evaluator:
    """Evaluates versions one after the other; weights stay on the engines until a version's last answer is in.

    Args:
        config: of the run.
        task: tokens of the prompts.
        prompts: of the task.
        scorer: rewards; accuracy is their mean.
        player: samples answers.
        fleet: tells when a version is installed.
        targets: versions to evaluate.
        journal: keeps results until a lease reply has carried them.
        bell: rung when an evaluation is done.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        prompts: Prompts,
        scorer: Scorer,
        player: Player,
        fleet: Fleet,
        targets: Targets,
        journal: Journal,
        bell: Bell,
    ) -> None:
        self._config, self._task, self._prompts, self._scorer = config, task, prompts, scorer
        self._player, self._fleet, self._targets = player, fleet, targets
        self._journal, self._bell = journal, bell

    async def run(self) -> None:
        """Evaluate for as long as the run lasts."""
        while True:
            await self._bell.until(self._installed)
            row = self._targets.pinned
            assert row is not None  # _installed() saw to it
            result = await self._while_pinned(row)
            if result is not None:
                self._journal.record_evaluation(result, row.checksum)
                self._targets.evaluated(row)
                self._bell.ring()

    def _installed(self) -> bool:
        row = self._targets.pinned
        return row is not None and any(engine.weights == row for engine in self._fleet.serving)

    async def _while_pinned(self, row: VersionRow) -> Evaluation | None:
        """The result; None when the version is given up, because nobody can load it any more."""
        evaluation = asyncio.create_task(self._evaluate(row))
        evaluation.add_done_callback(lambda _: self._bell.ring())
        try:
            await self._bell.until(lambda: evaluation.done() or self._targets.pinned != row)
            return evaluation.result() if evaluation.done() else None
        finally:
            evaluation.cancel()
            await asyncio.gather(evaluation, return_exceptions=True)

    async def _evaluate(self, row: VersionRow) -> Evaluation:
        started_s = time.monotonic()
        prompts = await self._prompts.held_out(self._config.rollout.eval.prompts)
        judged = await asyncio.gather(*(self._answer(number, prompt, row) for number, prompt in enumerate(prompts)))
        rewards = [reward for found in judged for reward in found.rewards]
        lengths = [tokens for found in judged for tokens in found.tokens]
        greedy = [reward for found in judged for reward in found.greedy]
        if not rewards:
            raise ControllerError(f"evaluation of step {row.step}: none of {len(prompts)} held-out answers was scored.")
        result = Evaluation(
            step=row.step,
            version=row.version,
            accuracy=sum(rewards) / len(rewards),
            responses=len(rewards),
            mean_tokens=sum(lengths) / len(lengths),
            seconds=time.monotonic() - started_s,
            greedy_accuracy=sum(greedy) / len(greedy) if greedy else None,
        )
        log.info("evaluation of step %d: %.4f over %d answers", row.step, result.accuracy, result.responses)
        return result

    async def _answer(self, number: int, prompt: Prompt, row: VersionRow) -> "_Judged":
        """Rewards and lengths of the answers to one prompt; nothing where environment or scorer failed, which is
        logged."""
        ids, evaluation = list(prompt.ids), self._config.rollout.eval
        check_prompt(ids, self._task.codec.vocab_size, f"held-out prompt {number}")
        sampled = evaluation.samples_per_prompt
        params = [self._params(evaluation.temperature, evaluation.top_p)] * sampled
        if evaluation.greedy:
            params.append(self._params(0.0, 1.0))
        drafts = [Draft(-1 - number, f"e{number:08d}", k, ids, how, row.version) for k, how in enumerate(params)]
        try:
            answers = await all_or_none(self._pinned(prompt, draft) for draft in drafts)
            rewards = await score(self._scorer, prompt, answers)
        except (EpisodeError, RewardError) as error:
            log.error("held-out prompt %d is left out of the evaluation of step %d: %s", number, row.step, error)
            return _Judged([], [], [])
        finally:
            self._fleet.forget_group(-1 - number)
        return _Judged(rewards[:sampled], rewards[sampled:], [len(answer.ids) for answer in answers[:sampled]])

    async def _pinned(self, prompt: Prompt, draft: Draft) -> Episode:
        for _ in range(_MAX_SAMPLES):
            answer = await self._player.play(prompt, draft)
            if {span.version for span in answer.versions} == {draft.version}:
                return answer
        raise ControllerError(
            f"{_MAX_SAMPLES} answers in a row to {draft.name} mixed other weights into version {draft.version}: "
            "someone else changes the engines' weights."
        )

    def _params(self, temperature: float, top_p: float) -> SamplingParams:
        training = sampling_params(self._config, self._task)
        return msgspec.structs.replace(training, temperature=temperature, top_p=top_p)
