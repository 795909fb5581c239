"""A file operation that fails on one rank is an error on all of them, at once."""

import pytest

from asympo_megatron.errors import CheckpointError
from asympo_megatron.testing.distributed import run_distributed


def outcome(rank):
    from asympo_megatron.mcore import Checkpoints

    def work():
        assert rank == 0, "only one rank works on the file system"
        raise PermissionError(13, "Permission denied", "step_000002")

    try:
        Checkpoints._from_rank0(work)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_every_rank_raises():
    found = run_distributed(outcome, 2, timeout_s=400)
    assert found == ["[Errno 13] Permission denied: 'step_000002'"] * 2


def test_one_rank_raises_the_same():
    assert outcome(0) == "[Errno 13] Permission denied: 'step_000002'"
    with pytest.raises(AssertionError):
        outcome(1)
