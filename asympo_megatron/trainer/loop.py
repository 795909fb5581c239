"""The training loop: lease groups, pack, step, publish, checkpoint.

lease(s) -> plan -> samples -> scoring passes -> learner.step -> weights s + 1 -> publish -> checkpoint -> row s + 1
"""

import time

from asympo_megatron import protocol
from asympo_megatron.config import Config
from asympo_megatron.errors import NonFiniteLossError, PreemptedError
from asympo_megatron.mcore import Checkpoints, Layout, Learner, Row
from asympo_megatron.packing import attention_cost, plan_microbatches
from asympo_megatron.trainer.preemption import Preemption
from asympo_megatron.trainer.publisher import Publisher
from asympo_megatron.trainer.rows import MetricsRows
from asympo_megatron.trainer.sources import Source


class TrainingLoop:
    """One run from its resumed step to ``run.steps``. Every rank executes every line."""

    def __init__(
        self,
        config: Config,
        learner: Learner,
        layout: Layout,
        source: Source,
        publisher: Publisher | None,
        checkpoints: Checkpoints,
        rows: MetricsRows,
        preemption: Preemption,
    ) -> None:
        self._config, self._learner, self._layout = config, learner, layout
        self._source, self._publisher = source, publisher
        self._checkpoints, self._rows, self._preemption = checkpoints, rows, preemption

    def run(self) -> None:
        """Train. Raises NonFiniteLossError or PreemptedError after saving and committing the last good state."""
        self._source.attach(self._learner.step_count)
        self._rows.start(self._source.incarnation, self._learner.step_count)
        checksum = self._learner.checksum()
        if self._publisher is not None:  # in any case: an earlier trainer's last version may have gone with its memory
            self._publisher.publish(self._learner, self._source.incarnation, checksum)
        try:
            for step in range(self._learner.step_count, self._config.run.steps):
                self._preemption.check()
                checksum = self._train_step(step)
        except (NonFiniteLossError, PreemptedError):
            self._checkpoint()  # the state between two steps is whole: keep it
            self._settle(wait=True)
            raise
        self._settle(wait=True)
        if self._publisher is not None:
            self._publisher.settle(wait=True)
        self._rows.finish(self._source.finish(self._learner.step_count))

    def _train_step(self, step: int) -> str:
        clock = _Clock()
        lease = self._source.lease(step, self._look_after)
        microbatches = self._fetch(lease)
        clock.lap("time/wait_s")
        for which in self._learner.passes:
            microbatches = self._learner.score(microbatches, which)
            clock.lap(f"time/score_{which}_s")
        figures = self._learner.step(microbatches, len(lease.responses))
        clock.lap("time/train_s")
        checksum = self._learner.checksum()
        clock.lap("time/checksum_s")
        self._publish(checksum)
        clock.lap("time/publish_s")
        self._settle(wait=False)
        if self._checkpoint_due(step + 1):
            self._checkpoint()
        clock.lap("time/checkpoint_s")
        self._rows.write(step + 1, lease, figures, checksum, clock.laps)
        return checksum

    def _fetch(self, lease: protocol.LeaseReply) -> list[list[Row]]:
        """The micro-batches of this DP rank: all ranks plan alike, each replica fetches only its own tokens."""
        responses = lease.responses
        plan = plan_microbatches(
            # a response without trained tokens travels as a row and is never computed
            [r.prompt_tokens + r.response_tokens if r.trained_tokens else 0 for r in responses],
            dp_size=self._layout.dp_size,
            max_tokens=self._config.batch.max_tokens_per_microbatch,
            pad_multiple=self._layout.pad_multiple,
            pack_multiple=self._layout.pack_multiple,
            cost=attention_cost(self._learner.plan.facts.hidden_size),
        )
        mine = plan.microbatches[self._layout.dp_rank]
        wanted = [(responses[i].group_id, responses[i].row) for batch in mine for i in batch]
        samples = iter(self._source.samples(lease.step, wanted))
        return [[_row(next(samples), responses[i].advantage) for i in batch] for batch in mine]

    def _publish(self, checksum: str) -> None:
        if self._publisher is not None and self._publisher.due(self._learner.step_count):
            self._publisher.publish(self._learner, self._source.incarnation, checksum)

    def _checkpoint_due(self, step: int) -> bool:
        interval = self._config.checkpoint.interval_steps
        return step == self._config.run.steps or (interval > 0 and step % interval == 0)

    def _checkpoint(self) -> None:
        """Save; with ``checkpoint.async_save`` in the background, one at a time."""
        self._settle(wait=True)
        self._source.fence()
        background = self._config.checkpoint.async_save
        self._checkpoints.begin(self._learner, background=background)
        if not background:
            self._settle(wait=True)

    def _look_after(self) -> None:
        """While a lease is waited for: what is under way may be done, or have failed (then no batch may ever come)."""
        self._settle(wait=False)
        if self._publisher is not None:
            self._publisher.settle(wait=False)

    def _settle(self, *, wait: bool) -> None:
        """Complete and commit the checkpoint that is begun, if there is one and it is written."""
        if self._checkpoints.pending and self._checkpoints.ready(wait=wait):
            self._source.fence()  # a trainer that was stopped while it wrote must not name a checkpoint
            saved = self._checkpoints.complete()
            self._source.commit(saved.step, saved.oldest_step)


def _row(sample: protocol.Sample, advantage: float) -> Row:
    return Row(sample.prompt_ids, sample.ids, sample.mask, advantage, sample.behavior_logprobs)


class _Clock:
    """Wall time between laps, in seconds, by name; ``time/step_s`` is their sum."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
        self.laps["time/step_s"] = now - self._start
