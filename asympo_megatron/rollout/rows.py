"""Rows of the journal as plain data."""

from enum import StrEnum

import msgspec

from asympo_megatron.protocol import COLLECTIVE, COLOCATED
from asympo_megatron.records import Group


class GroupState(StrEnum):
    """in_flight -> ready -> leased -> committed, or dropped with a reason; a resume turns committed into leased."""

    IN_FLIGHT = "in_flight"
    READY = "ready"
    LEASED = "leased"
    COMMITTED = "committed"
    DROPPED = "dropped"


class ResponseSummary(msgspec.Struct, frozen=True, array_like=True):
    """What planning, lag and metrics need of a response: everything but its tokens."""

    prompt_tokens: int
    response_tokens: int
    trained_tokens: int
    advantage: float
    reward: float
    """As the scorer gave it; a penalty for truncated responses is in the advantage alone."""
    versions: list[int]
    """Distinct weight versions that sampled it; empty for replayed groups."""
    truncated: bool
    turns: int = 1
    out_of_turns: bool = False
    """Ended by task.max_turns."""


class StoredGroup(msgspec.Struct, frozen=True):
    """A scored group as the journal keeps it."""

    group: Group
    advantages: list[float]


class GroupRow(msgspec.Struct, frozen=True):
    """A group of the journal without its tokens."""

    group_id: int
    prompt_index: int
    state: GroupState
    reason: str | None
    lease_step: int | None
    responses: list[ResponseSummary]
    pruned: bool
    """True when the journal holds no tokens for it."""


class VersionRow(msgspec.Struct, frozen=True):
    """A published weight version."""

    version: int
    step: int
    incarnation: int
    checksum: str
    path: str
    """A directory, or the address of the sender that holds it in memory."""

    @property
    def in_memory(self) -> bool:
        """Whether the version lies with the trainer, and ends with it."""
        return self.path.startswith((COLLECTIVE, COLOCATED))


def summarize(stored: StoredGroup) -> list[ResponseSummary]:
    """The summary of a scored group, one entry a response."""
    prompt_tokens = len(stored.group.prompt_ids)
    return [
        ResponseSummary(
            prompt_tokens=prompt_tokens,
            response_tokens=len(response.ids),
            trained_tokens=response.trained_tokens,
            advantage=advantage,
            reward=response.reward,
            versions=sorted({span.version for span in response.versions}),
            truncated=response.finish_reason == "length",
            turns=response.turns,
            out_of_turns=response.finish_reason == "turns",
        )
        for response, advantage in zip(stored.group.responses, stored.advantages, strict=True)
    ]
