"""One rank asks, all ranks hear: answers, refusals and bugs, over real gloo ranks."""

import pytest

from asympo_megatron import protocol
from asympo_megatron.errors import CheckpointError, ControllerError, StaleIncarnationError
from asympo_megatron.testing.distributed import run_distributed
from asympo_megatron.trainer.exchange import Exchange

WORLD = 3
REPLICA_OF = [0, 0, 1]


def refuse():
    raise StaleIncarnationError("a newer trainer has attached")


def stumble():
    raise ZeroDivisionError("a bug")


def outcome(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def scenario(rank):
    """What every rank sees of one exchange after another; a rank that waited alone would run into the time-out."""
    exchange = Exchange(rank, WORLD, REPLICA_OF[rank])
    asked = []

    def manifest():
        asked.append(rank)
        return protocol.AttachReply(41 + rank)

    def tokens():
        asked.append(rank)
        return [protocol.Sample([rank], [1, 2], [1, 0])]

    seen = {
        "answer": outcome(lambda: exchange.from_rank0(manifest, protocol.AttachReply).incarnation),
        "nothing": outcome(lambda: exchange.from_rank0(lambda: None, None)),
        "refusal": outcome(lambda: exchange.from_rank0(refuse, protocol.AttachReply)),
        "bug": outcome(lambda: exchange.from_rank0(stumble, None)),
        "tokens": outcome(lambda: exchange.from_replica(tokens, list[protocol.Sample])[0].prompt_ids),
        "one replica fails": outcome(
            lambda: exchange.from_replica(refuse if rank == 2 else tokens, list[protocol.Sample])
        ),
        "agreed": outcome(lambda: exchange.agree(CheckpointError("disk full") if rank == 1 else None)),
    }
    return seen, asked


def test_every_rank_hears_the_same():
    results = run_distributed(scenario, WORLD, timeout_s=400)
    for rank, (seen, _) in enumerate(results):
        assert seen["answer"] == 41
        assert seen["nothing"] is None
        assert seen["refusal"] == "StaleIncarnationError: a newer trainer has attached"
        assert seen["bug"] == "ControllerError: ZeroDivisionError: a bug"
        assert seen["tokens"] == [0 if REPLICA_OF[rank] == 0 else 2]
    replica = [seen["one replica fails"] for seen, _ in results]
    assert replica[2] == "StaleIncarnationError: a newer trainer has attached"
    assert replica[0] == replica[1] == "ControllerError: rank 2 failed; its log has the reason."
    agreed = [seen["agreed"] for seen, _ in results]
    assert agreed[1] == "CheckpointError: disk full"
    assert agreed[0] == agreed[2] == "ControllerError: rank 1 failed; its log has the reason."
    # only rank 0 asked for the manifest, only the first rank of each replica for tokens (twice, once in vain on 2)
    assert [asked for _, asked in results] == [[0, 0, 0], [], [2]]


def test_a_single_rank_needs_no_process_group():
    exchange = Exchange(0, 1, 0)
    assert exchange.from_rank0(lambda: 5, int) == 5
    assert exchange.from_replica(lambda: [1], list[int]) == [1]
    with pytest.raises(ControllerError, match="no luck"):
        exchange.agree(ControllerError("no luck"))
