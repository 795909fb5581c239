"""The state of every group in memory, changed only together with the journal."""

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from asympo_megatron.errors import JournalError
from asympo_megatron.rollout.admission import NO_LAG, LagRule
from asympo_megatron.rollout.discards import Discards
from asympo_megatron.rollout.journal import Journal
from asympo_megatron.rollout.rows import GroupRow, GroupState, ResponseSummary, StoredGroup, VersionRow, summarize


@dataclass(frozen=True)
class ScoredGroup:
    """A group that waits for a lease, or is part of one."""

    group_id: int
    responses: list[ResponseSummary]
    sampled_step: int
    """Step of the oldest weights that sampled any of its tokens."""


@dataclass
class Groups:
    """What a controller must know of the groups of its journal to go on."""

    next_id: int = 0
    next_prompt: int = 0
    in_flight: dict[int, int] = field(default_factory=dict)
    """group_id -> prompt_index: to be sampled, or sampled again after a crash of the controller."""
    ready: dict[int, ScoredGroup] = field(default_factory=dict)
    leases: dict[int, list[ScoredGroup]] = field(default_factory=dict)
    """By step, as long as the journal holds their tokens."""
    dropped: list[int] = field(default_factory=list)
    """Ascending ids."""
    next_step: int = 0
    """The first step without a lease."""

    @property
    def live(self) -> int:
        """Groups that hold a slot: committed + leased + ready + in flight."""
        return self.next_id - len(self.dropped)

    def position(self, group_id: int) -> int:
        """Number of live groups that were admitted before this one."""
        return group_id - bisect.bisect_left(self.dropped, group_id)


def recover(rows: Iterable[GroupRow], version_steps: Mapping[int, int]) -> Groups:
    """Rebuild the state from a journal.

    Args:
        rows: every group in the order of admission.
        version_steps: the step of every published weight version.

    Raises:
        JournalError: ids with gaps, or a state that no sequence of events leads to.
    """
    groups = Groups()
    for row in rows:
        if row.group_id != groups.next_id:
            raise JournalError(f"the journal has group {row.group_id} where group {groups.next_id} belongs.")
        groups.next_id += 1
        groups.next_prompt = max(groups.next_prompt, row.prompt_index + 1)
        if row.state is GroupState.IN_FLIGHT:
            groups.in_flight[row.group_id] = row.prompt_index
        elif row.state is GroupState.READY:
            groups.ready[row.group_id] = _scored(row.group_id, row.responses, version_steps)
        elif row.state is GroupState.DROPPED:
            groups.dropped.append(row.group_id)
        elif row.lease_step is None:
            raise JournalError(f"group {row.group_id} of the journal is {row.state} without the step of its lease.")
        else:
            groups.next_step = max(groups.next_step, row.lease_step + 1)
            if not row.pruned:
                lease = groups.leases.setdefault(row.lease_step, [])
                lease.append(_scored(row.group_id, row.responses, version_steps))
    return groups


def _scored(group_id: int, responses: list[ResponseSummary], version_steps: Mapping[int, int]) -> ScoredGroup:
    steps = (version_steps[version] for row in responses for version in row.versions)
    return ScoredGroup(group_id, responses, min(steps, default=NO_LAG))


class Ledger:
    """Groups and versions of a run: every change is in the journal before it is in memory."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.versions: dict[int, VersionRow] = {row.version: row for row in journal.versions()}
        self.version_steps = {version: row.step for version, row in self.versions.items()}
        self._groups = recover(journal.rows(), self.version_steps)
        self.discards = Discards()

    @property
    def groups(self) -> Groups:
        """The current state; read it, change it only through the methods here."""
        return self._groups

    def admit(self, count: int) -> list[tuple[int, int]]:
        """Start ``count`` groups on the next prompts; returns (group_id, prompt_index) pairs."""
        groups = self._groups
        pairs = [(groups.next_id + k, groups.next_prompt + k) for k in range(count)]
        self._journal.admit(pairs)
        groups.in_flight.update(pairs)
        groups.next_id += count
        groups.next_prompt += count
        return pairs

    def finish_group(self, group_id: int, stored: StoredGroup) -> None:
        """A group is scored: it waits for a lease."""
        summary = summarize(stored)
        self._journal.finish_group(group_id, stored, summary)
        del self._groups.in_flight[group_id]
        self._groups.ready[group_id] = _scored(group_id, summary, self.version_steps)

    def drop(self, group_id: int, reason: str) -> None:
        """A group in flight will never be trained: its slot is free again."""
        self._journal.drop({group_id: reason})
        del self._groups.in_flight[group_id]
        bisect.insort(self._groups.dropped, group_id)

    def discard(self, group_id: int, reason: str, stored: StoredGroup) -> None:
        """The same for a group that is scored."""
        self.drop(group_id, reason)
        self.discards.add(summarize(stored))

    def form_lease(self, step: int, rule: LagRule) -> list[ScoredGroup] | None:
        """Bind the batch of ``step`` (which must be the next one), or None while it is not complete."""
        groups = self._groups
        sampled = {group_id: group.sampled_step for group_id, group in groups.ready.items()}
        selection = rule.select(step, groups.in_flight.keys(), sampled)
        if selection.group_ids is None:
            if selection.dropped:
                self._journal.drop(selection.dropped)
                self._forget(selection.dropped)
            return None
        self._journal.lease(step, selection.group_ids, selection.dropped)
        self._forget(selection.dropped)
        groups.leases[step] = [groups.ready.pop(group_id) for group_id in selection.group_ids]
        groups.next_step = step + 1
        return groups.leases[step]

    def payload(self, group_id: int) -> StoredGroup:
        """The tokens of a leased group."""
        return self._journal.payload(group_id)

    def attach(self, resumed_step: int) -> int:
        """A trainer takes over; leases from its step on stay as they are."""
        return self._journal.attach(resumed_step)

    def commit(self, step: int, oldest_step: int) -> None:
        """A checkpoint of ``step`` is final."""
        self._journal.commit(step, oldest_step)
        for old in [known for known in self._groups.leases if known < min(step, oldest_step)]:
            del self._groups.leases[old]

    def publish(self, row: VersionRow) -> None:
        """Weights of a version lie on disk."""
        self._journal.publish(row)
        self.versions[row.version] = row
        self.version_steps[row.version] = row.step

    def _forget(self, dropped: Mapping[int, str]) -> None:
        for group_id in dropped:
            self.discards.add(self._groups.ready.pop(group_id).responses)
            bisect.insort(self._groups.dropped, group_id)
