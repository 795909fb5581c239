"""A process group of its own for one engine: the trainer's sender is rank 0, the ranks of the engine follow.

SGLang joins through ``init_custom_process_group``: a TCPStore, below it prefixes with the group's name and the device.
The same keys are used here, on a store of our own: the rendezvous of torch would take torchrun's store instead.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKENDS = {"gloo": "cpu", "nccl": "cuda"}
"""Device of the tensors that a backend moves."""


@dataclass(frozen=True)
class WeightGroup:
    """One joined group. Nothing of it is registered with torch.distributed: it ends when it is dropped."""

    backend: str
    group: Any
    """ProcessGroupGloo or ProcessGroupNCCL; the stubs of torch do not describe them."""

    @property
    def device(self) -> torch.device:
        """Where tensors must lie."""
        return torch.device(BACKENDS[self.backend])

    def broadcast(self, tensor: Tensor) -> None:
        """Collective: rank 0's bytes reach every other rank. Raises RuntimeError when the group's deadline passes."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self.group.broadcast([tensor], options).wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # wait() only orders streams; whoever asked needs the bytes to be there

    def abort(self) -> None:
        """End what still runs in the group; a backend without this ends at its deadline."""
        abort = getattr(self.group, "abort", None)
        if abort is not None:
            abort()


def open_store(host: str, timeout_s: float) -> dist.TCPStore:
    """The meeting point of one group, on any free port (``store.port``); nobody needs to be there yet."""
    deadline = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, 0, is_master=True, timeout=deadline, wait_for_workers=False)


def reach_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The same store, seen from a rank that receives."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def join_group(
    store: dist.TCPStore, name: str, rank: int, world_size: int, backend: str, timeout_s: float, host: str | None = None
) -> WeightGroup:
    """Collective: meet the other ranks.

    Args:
        store: where they meet.
        name: of the group; used once.
        rank: 0 sends.
        world_size: the sender and every rank of the engine.
        backend: gloo | nccl.
        timeout_s: deadline of the meeting and of every broadcast.
        host: address of this side (gloo); None leaves the choice to gloo (GLOO_SOCKET_IFNAME).

    Raises:
        RuntimeError: somebody did not come in time.
    """
    keys = dist.PrefixStore(f"{BACKENDS[backend]}/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
    deadline = timedelta(seconds=timeout_s)
    kind: Any = dist.ProcessGroupGloo if backend == "gloo" else dist.ProcessGroupNCCL
    options = kind._Options() if backend == "gloo" else kind.Options()
    options._timeout = deadline
    if backend == "gloo":
        options._devices = [kind.create_default_device() if host is None else kind.create_device(hostname=host)]
    return WeightGroup(backend, kind(keys, rank, world_size, options))
