"""Messages between trainer and controller (msgpack over HTTP, one struct a direction).

    attach -> lease(s) -> payload -> [optimizer step s] -> publish(s + 1) -> lease(s + 1) ... commit(s) -> finish

``step`` s counts completed optimizer steps: ``lease(s)`` asks for the batch of the step that turns weights s into
weights s + 1. ``commit(s)`` says that a finalised checkpoint holds weights s, so every lease below s is done for good.
"""

import msgspec

from asympo_megatron.records import VersionSpan

PROTOCOL_VERSION = 1
COLLECTIVE = "collective://"
"""Begins the path of a version that the trainer broadcasts: what follows is the address of its sender."""
COLOCATED = "colocated://"
"""The same for a version that the trainer shares with engines of its machine."""


class AttachRequest(msgspec.Struct, frozen=True):
    """A trainer takes over the run. Implies commit(resumed_step); leases from there on re-open unchanged."""

    run_id: str
    config_hash: str
    resumed_step: int
    protocol: int = PROTOCOL_VERSION


class AttachReply(msgspec.Struct, frozen=True):
    """``incarnation`` is larger than every earlier one; calls that carry an older one are refused (HTTP 409)."""

    incarnation: int


class LeaseRequest(msgspec.Struct, frozen=True):
    """Ask for the batch of ``step``; the controller answers within about ``wait_s`` even when it is not ready."""

    incarnation: int
    step: int
    wait_s: float = 10.0


class LeasedResponse(msgspec.Struct, frozen=True):
    """One response of a lease: enough to plan packing without its tokens."""

    group_id: int
    row: int
    """Row of the response inside its group."""
    prompt_tokens: int
    response_tokens: int
    trained_tokens: int
    """Tokens with mask 1; 0 for a masked response, which still counts in N."""
    advantage: float
    reward: float
    lag: int
    """step of the lease - step of the oldest weight version that sampled any token (negative: clipped to 0)."""


class Evaluation(msgspec.Struct, frozen=True):
    """One finished evaluation on held-out prompts at a pinned weight version."""

    step: int
    version: int
    accuracy: float
    responses: int
    mean_tokens: float
    seconds: float
    greedy_accuracy: float | None = None
    """Of one answer a prompt at temperature 0, where rollout.eval.greedy asks for it."""


class LeaseReply(msgspec.Struct, frozen=True):
    """The manifest of a step (``ready``), or only the controller's figures when the batch is not complete yet."""

    ready: bool
    step: int
    responses: list[LeasedResponse] = []
    metrics: dict[str, float] = {}
    """Flat names as in metrics.jsonl: reward/*, lag/*, rollout/*, sync/*."""
    evaluations: list[Evaluation] = []
    """Evaluations finished since the previous lease reply of this incarnation."""


class PayloadRequest(msgspec.Struct, frozen=True):
    """Tokens of some responses of the lease of ``step``: (group_id, row) pairs."""

    incarnation: int
    step: int
    rows: list[tuple[int, int]]


class Sample(msgspec.Struct, frozen=True):
    """The tokens of one leased response."""

    prompt_ids: list[int]
    ids: list[int]
    mask: list[int]
    versions: list[VersionSpan] = []
    behavior_logprobs: list[float] | None = None


class PayloadReply(msgspec.Struct, frozen=True):
    """Samples in the order of the request."""

    samples: list[Sample]


class VersionRequest(msgspec.Struct, frozen=True):
    """Ask which version number the weights of ``step`` get. ``checksum`` identifies the weights."""

    incarnation: int
    step: int
    checksum: str


class VersionReply(msgspec.Struct, frozen=True):
    """``needed`` is false when the engines already hold weights of this checksum: nothing to publish."""

    version: int
    needed: bool


class PublishRequest(msgspec.Struct, frozen=True):
    """Weights ``version`` lie complete under ``path``; the controller brings them to the engines."""

    incarnation: int
    step: int
    version: int
    checksum: str
    path: str


class PublishReply(msgspec.Struct, frozen=True):
    """Versions that must not be removed because an engine is, or may be, loading them."""

    in_use: list[int]


class CommitRequest(msgspec.Struct, frozen=True):
    """A finalised checkpoint holds weights ``step``; ``oldest_step`` is the oldest checkpoint still kept."""

    incarnation: int
    step: int
    oldest_step: int


class FinishRequest(msgspec.Struct, frozen=True):
    """Training reached its last step. The reply comes when the last evaluation is done (or after ``wait_s``)."""

    incarnation: int
    step: int
    wait_s: float = 10.0


class FinishReply(msgspec.Struct, frozen=True):
    done: bool
    evaluations: list[Evaluation] = []


class JoinGroupRequest(msgspec.Struct, frozen=True):
    """Controller to the trainer's sender: open a process group for one engine's copy of ``version``."""

    group: str
    """Name of the group, never used before."""
    world_size: int
    """The sender, and every rank of the engine."""
    version: int


class BucketInfo(msgspec.Struct, frozen=True):
    """Names, torch dtypes and shapes of the tensors in one bucket, in order."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class JoinGroupReply(msgspec.Struct, frozen=True):
    """Where the engine's ranks meet the sender, and what will come."""

    host: str
    port: int
    backend: str
    buckets: list[BucketInfo]


class SendBucketRequest(msgspec.Struct, frozen=True):
    """Broadcast one bucket in a group; the reply comes when it is out."""

    group: str
    bucket: int


class LeaveGroupRequest(msgspec.Struct, frozen=True):
    """The transfer is over, or has failed."""

    group: str


class OpenChannelRequest(msgspec.Struct, frozen=True):
    """Controller to the trainer's sharer: memory for one engine's copy of ``version``."""

    channel: str
    """Name of the transfer, never used before."""
    version: int


class OpenChannelReply(msgspec.Struct, frozen=True):
    """How many buckets will come."""

    buckets: int


class ShareBucketRequest(msgspec.Struct, frozen=True):
    """Put one bucket into the channel's memory, in place of the one before it."""

    channel: str
    bucket: int
    ranks: int
    """Processes of the engine that will map it."""


class ShareBucketReply(msgspec.Struct, frozen=True):
    """For each rank of the engine, what it opens: see ``asympo_megatron.sync.handles``."""

    messages: list[str]


class BringVersionRequest(msgspec.Struct, frozen=True):
    """Controller to the mirror of an engine's host: have a whole copy of ``version`` there."""

    transfer: str
    """Name of the transfer, never used before."""
    version: int


class BringVersionReply(msgspec.Struct, frozen=True):
    """Directory of the copy, on that host; it stays until the transfer is released."""

    path: str


class ErrorReply(msgspec.Struct, frozen=True):
    """Body of every answer that is not 200. ``kind`` is a class name of :mod:`asympo_megatron.errors`."""

    kind: str
    message: str
