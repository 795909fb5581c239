"""Those who receive weights in weight_sync.py: an embedded engine, and a bare torch.distributed rank."""

import contextlib
import hashlib
import json
import multiprocessing
import urllib.request
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from asympo_megatron.engine import EngineOptions, scheduler
from asympo_megatron.protocol import COLOCATED
from asympo_megatron.rollout.client import EngineClient
from asympo_megatron.rollout.collective import Collective
from asympo_megatron.rollout.colocated import Colocated
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.testing.engine_server import engine_server

TIMEOUT_S = 120.0
LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def engine_process(served: EngineOptions, *, loads: bool = True) -> Iterator[str]:
    """An embedded engine in a process of its own; yields its url. Without ``loads`` it receives and checks only."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, served, loads), daemon=True)
    process.start()
    there.close()
    try:
        yield here.recv()
    finally:
        here.close()
        process.join(TIMEOUT_S)


def _serve(pipe: Connection, served: EngineOptions, loads: bool) -> None:
    torch.set_num_threads(1)
    nothing = contextlib.nullcontext() if loads else mock.patch.object(scheduler, "replace_weights")
    with nothing, engine_server(served) as url:
        pipe.send(url)
        with contextlib.suppress(EOFError):  # the other end was closed
            pipe.recv()


@contextlib.contextmanager
def raw_receiver(count: int, *, loads: bool = False) -> Iterator[Callable[[Tensor], None]]:
    """Another process that receives ``count`` bytes, copies them where it ``loads``, and says so, again and again."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    process = context.Process(target=_receive, args=(store.port, count, loads), daemon=True)
    process.start()
    dist.init_process_group("gloo", store=dist.PrefixStore("raw", store), rank=0, world_size=2)
    word = torch.zeros(1)

    def broadcast(flat: Tensor) -> None:
        dist.broadcast(flat, 0)
        dist.broadcast(word, 1)

    try:
        yield broadcast
    finally:
        process.terminate()
        process.join()
        dist.destroy_process_group()


def _receive(port: int, count: int, loads: bool) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore(LOOPBACK, port, is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("raw", store), rank=1, world_size=2)
    flat, word = torch.zeros(count, dtype=torch.uint8), torch.zeros(1)
    weights = torch.ones(count if loads else 0, dtype=torch.uint8)
    while True:
        dist.broadcast(flat, 0)
        weights.copy_(flat[: weights.numel()])
        dist.broadcast(word, 1)


async def transfer(url: str, address: str) -> None:
    """One engine's update, as the controller makes it."""
    client = EngineClient(url, None, request_timeout_s=TIMEOUT_S, control_timeout_s=TIMEOUT_S)
    try:
        way = Colocated if address.startswith(COLOCATED) else Collective
        opened = await way("benchmark.", None, TIMEOUT_S).open(client, VersionRow(1, 1, 1, "checksum", address))
        try:
            await client.pause("in_place")
            await opened.run("1", flush_cache=False)
            if await client.weight_label() != "1":
                raise RuntimeError("the engine does not report version 1.")
            await client.resume()
        finally:
            await opened.close()
    finally:
        await client.close()


def expect_arrived(weights: dict[str, Tensor], url: str) -> None:
    """The engine's own digests of what it serves."""
    request = urllib.request.Request(url + "/weights_checker", data=b"{}", method="POST")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        served = json.load(answer)["ranks"][0]["checksums"]
    for name, tensor in weights.items():
        if served[name] != hashlib.sha256(raw(tensor)).hexdigest()[:16]:
            raise RuntimeError(f"{name} did not arrive as it was sent.")


def expect_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """A transfer that brings something else is not fast, but wrong."""
    for name, tensor in wanted.items():
        if not torch.equal(got[name], tensor):
            raise RuntimeError(f"{name} did not arrive as it was sent.")


def raw(tensor: Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy().data
