"""The lag rule as arithmetic: which prompts may start, which requests may sample, which groups make a batch.

Groups are numbered in the order of admission. The *position* of a group is its number among the groups that were not
dropped; a group at position k is trained at step floor(k / groups_per_step) when nothing overtakes it. It may sample
only while the engines hold weights of a step of at least floor(k / groups_per_step) - max_lag_steps, that is while

    position < (max_lag_steps + step + 1) * groups_per_step

For a new prompt ``position`` is ``live``, the count of groups that are committed, leased, ready or in flight: the
admission rule. The same inequality, asked again before every request, also holds after a resume, when ``step`` falls.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

NO_LAG = 2**62
"""Sampling step of a group without recorded versions: it can never be stale."""


@dataclass(frozen=True)
class Selection:
    """A batch (None: not complete yet) and the groups that are dropped on the way, each with a reason."""

    group_ids: tuple[int, ...] | None
    dropped: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LagRule:
    """Admission arithmetic of one run.

    Args:
        groups_per_step: groups in a global batch.
        max_lag_steps: bound of lag; 0 is synchronous RL.
        total_steps: optimizer steps of the run: no prompt starts that would never be trained.
        policy: admission | strict | drop.
    """

    groups_per_step: int
    max_lag_steps: int
    total_steps: int
    policy: str = "admission"

    def capacity(self, step: int) -> int:
        """Groups that may be live while the engines hold weights of ``step``."""
        return min(self.max_lag_steps + step + 1, self.total_steps) * self.groups_per_step

    def slots(self, step: int, live: int) -> int:
        """New prompts that may start now."""
        return max(0, self.capacity(step) - live)

    def may_sample(self, step: int, position: int) -> bool:
        """Whether a group at ``position`` may have tokens sampled by weights of ``step``."""
        return position < self.capacity(step)

    def select(self, step: int, in_flight: Collection[int], ready: Mapping[int, int]) -> Selection:
        """The batch of ``step``.

        Args:
            step: the learner's step.
            in_flight: ids of groups that are not scored yet.
            ready: id -> step of the oldest weights that sampled any of its tokens.
        """
        dropped = {}
        if self.policy == "drop":
            dropped = {
                group_id: f"lag {step - sampled} above max_lag_steps {self.max_lag_steps} at step {step}"
                for group_id, sampled in ready.items()
                if step - sampled > self.max_lag_steps
            }
        candidates = sorted(group_id for group_id in ready if group_id not in dropped)
        if self.policy == "strict":
            candidates = sorted((*candidates, *in_flight))
        batch = tuple(candidates[: self.groups_per_step])
        complete = len(batch) == self.groups_per_step and all(group_id in ready for group_id in batch)
        return Selection(batch if complete else None, dropped)


def lag_of(step: int, sampled: int) -> int:
    """Lag of a response in the batch of ``step`` whose oldest weights were of step ``sampled``, clipped at 0."""
    return max(0, step - sampled)
