"""One rank asks, every rank hears: answers and errors travel to all ranks, so that none waits alone in a collective."""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist

from asympo_megatron import errors
from asympo_megatron.errors import AsympoError, ControllerError

T = TypeVar("T")


class Exchange:
    """Shares results of calls that only one rank makes.

    Args:
        rank, world_size: of this process.
        dp_rank: which model replica this rank belongs to; ranks of one replica need the same tokens.

    The groups are gloo on purpose: manifests are bytes on the host, on GPU machines too.
    """

    def __init__(self, rank: int, world_size: int, dp_rank: int) -> None:
        self.rank, self.world_size, self.dp_rank = rank, world_size, dp_rank
        self._world: dist.ProcessGroup | None = None
        self._replica: dist.ProcessGroup | None = None
        self._source = rank
        if world_size > 1:
            self._world = dist.new_group(backend="gloo")
            replica_of = [0] * world_size
            dist.all_gather_object(replica_of, dp_rank, group=self._world)
            for replica in sorted(set(replica_of)):
                members = [r for r in range(world_size) if replica_of[r] == replica]
                group = dist.new_group(members, backend="gloo")
                if replica == dp_rank:
                    self._replica, self._source = group, members[0]

    def from_rank0(self, call: Callable[[], T], kind: Any) -> T:
        """Run ``call`` on rank 0; every rank returns its result (decoded as ``kind``) or raises its error."""
        return self._share(call, kind, source=0, group=self._world)

    def from_replica(self, call: Callable[[], T], kind: Any) -> T:
        """Run ``call`` on the first rank of each replica; an error anywhere is raised on every rank."""
        result: T | None = None
        problem: AsympoError | None = None
        try:
            result = self._share(call, kind, source=self._source, group=self._replica)
        except AsympoError as error:
            problem = error
        self.agree(problem)
        assert result is not None
        return result

    def agree(self, problem: AsympoError | None) -> None:
        """Collective: if any rank brings a problem, every rank raises (its own, or a pointer to the rank's)."""
        if self._world is not None:
            worst = torch.tensor([self.rank if problem else -1])
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self._world)
            if problem is None and worst.item() >= 0:
                problem = ControllerError(f"rank {worst.item()} failed; its log has the reason.")
        if problem is not None:
            raise problem

    def any(self, flag: bool) -> bool:
        """Collective: whether any rank says so."""
        if self._world is None:
            return flag
        said = torch.tensor([int(flag)])
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._world)
        return bool(said.item())

    def _share(self, call: Callable[[], T], kind: Any, source: int, group: dist.ProcessGroup | None) -> T:
        if group is None:
            return call()
        body = b""
        if self.rank == source:
            body = _capture(call)
        size = torch.tensor([len(body)])
        dist.broadcast(size, source, group=group)
        data = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(0, dtype=torch.uint8)
        if self.rank != source:
            data = torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(data, source, group=group)
        return _release(data.numpy().tobytes(), kind)


def _capture(call: Callable[[], object]) -> bytes:
    """First byte says whether a result or an error follows. A bug (any other exception) must also reach all ranks."""
    try:
        return b"+" + msgspec.msgpack.encode(call())
    except AsympoError as error:
        return b"-" + msgspec.msgpack.encode((type(error).__name__, str(error)))
    except Exception as error:
        return b"-" + msgspec.msgpack.encode(("ControllerError", f"{type(error).__name__}: {error}"))


def _release(body: bytes, kind: Any) -> Any:
    if body[:1] == b"+":
        return msgspec.msgpack.decode(body[1:], type=kind)
    name, message = msgspec.msgpack.decode(body[1:], type=tuple[str, str])
    raise errors.revive(name, message)
