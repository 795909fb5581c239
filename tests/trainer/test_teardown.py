"""Process groups are ended together, or by the end of the process."""

from types import SimpleNamespace
from typing import Any

import pytest

from asympo_megatron.config import Config
from asympo_megatron.errors import NonFiniteLossError, PreemptedError
from asympo_megatron.trainer import run
from asympo_megatron.trainer.preemption import StopSignals


@pytest.mark.parametrize(
    ("world_size", "error", "ended"),
    [
        (2, OSError("the disk of this rank"), False),
        (2, MemoryError(), False),
        (2, KeyboardInterrupt(), False),
        (2, PreemptedError("asked to stop"), True),
        (2, NonFiniteLossError("NaN on every rank"), True),
        (1, OSError("the disk of the only rank"), True),
    ],
)
def test_a_rank_that_fails_alone_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch, world_size: int, error: BaseException, ended: bool
) -> None:
    """To end a group of NCCL takes all its ranks, and the others are waiting in some collective."""
    ends: list[str] = []

    def fail(*_: Any) -> None:
        raise error

    layout = SimpleNamespace(rank=0, world_size=world_size, dp_rank=0)
    monkeypatch.setattr(run, "initialize", lambda _: layout)
    monkeypatch.setattr(run, "shutdown", lambda: ends.append("shutdown"))
    monkeypatch.setattr(run, "Exchange", fail)
    with pytest.raises(type(error)):
        run.train(Config(), StopSignals())
    assert bool(ends) == ended
