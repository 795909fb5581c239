"""What a weight sync costs: each transport beside a bare transfer of the same bytes, the trainer's memory, its stall.

    python benchmarks/weight_sync.py [--quick] [--save]

disk: write_version, the controller's check of the files, the embedded engine's reading and replacing, beside one plain
file that is written, fsynced, loaded and copied. Both without digests; the digests are shown by themselves.

collective: the controller's own transfer (join, pause, session, buckets, label, continue) from a WeightSender to an
embedded engine in a process of its own, beside torch.distributed.broadcast of one tensor to another process and a word
back. First to an engine that receives and checks; then (with_load, without a goal) to one that replaces its weights,
beside a process that copies what it received. gloo on the loopback device. colocated: the latter by shared memory.

Wall time, medians of interleaved pairs. Memory is what the trainer's process holds beyond its weights and cannot give
back (anonymous and shared), at the worst moment while a version is stored and sent; the tensors come as copies, as a
gather makes them. The stall is the time that a publish keeps the learner from its next step, beside the time of that
gather alone. --quick: a fifth of the bytes; opening a group then weighs too much for a goal of collective.
Results: docs/asynchrony.md.
"""

import asyncio
import contextlib
import functools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from torch import Tensor
from transformers import AutoConfig
from weight_peers import (
    LOOPBACK,
    TIMEOUT_S,
    engine_process,
    expect_arrived,
    expect_equal,
    raw,
    raw_receiver,
    transfer,
)

from asympo_megatron.engine import EngineOptions
from asympo_megatron.engine.model import ServedModel, load_model, read_weights, replace_weights
from asympo_megatron.sync import manifest, verify_version, write_version
from asympo_megatron.sync.sender import WeightSender
from asympo_megatron.sync.sharer import WeightSharer
from asympo_megatron.sync.transport import DiskTransport, SenderTransport, Transport
from asympo_megatron.trainer.handover import Handover

MEBIBYTE = 2**20
GOAL = 0.8
REPEATS = 5
TRANSPORTS = ("disk", "collective", "colocated")


@dataclass(frozen=True)
class Size:
    """How much is moved, and how."""

    layers: int
    hidden: int
    vocab: int
    bucket_bytes: int


FULL = Size(layers=8, hidden=1024, vocab=32_000, bucket_bytes=256 * MEBIBYTE)
QUICK = Size(layers=1, hidden=1024, vocab=16_000, bucket_bytes=64 * MEBIBYTE)


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    report = harness.Report("weight_sync", save=arguments.save)
    with tempfile.TemporaryDirectory() as folder:
        run(report, QUICK if arguments.quick else FULL, Path(folder))
    return report.finish()


def run(report: harness.Report, size: Size, root: Path) -> None:
    """All parts."""
    make_config(size, root / "model")
    served = load_model(options(root, seed=0))
    weights = {name: tensor.clone() for name, tensor in served.module.named_parameters()}
    report.show("weight_sync/weights", total_bytes(weights) / MEBIBYTE, "MiB", tensors=len(weights))
    by_disk(report, served, weights, root)
    with engine_process(options(root, seed=1), loads=False) as url:
        by_collective(report, weights, size, url, loads=False)
    with engine_process(options(root, seed=1)) as url:
        by_collective(report, weights, size, url, loads=True)
        by_sharing(report, weights, size, url)
        memory(report, size, root, url)
    stall(report, weights, size, root)


def options(root: Path, seed: int) -> EngineOptions:
    return EngineOptions(str(root / "model"), load_format="dummy", seed=seed, threads=1)


def make_config(size: Size, path: Path) -> None:
    """A dense model of that size: config.json alone."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=7 * size.hidden // 2,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=max(size.hidden // 128, 1),
        head_dim=64,
        tie_word_embeddings=True,
        dtype="float32",
    )
    config.save_pretrained(path)


def total_bytes(weights: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def gathered(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """One tensor after the other, a copy each, as a gather over ranks makes them."""
    for name, tensor in weights.items():
        yield name, tensor.clone()


def judge_speed(
    report: harness.Report, name: str, pairs: harness.Pairs, moved_bytes: int, *, goal: float | None, **facts: Any
) -> None:
    """Speed beside the bare transfer, and what both took."""
    low, high = pairs.quartiles
    facts["quartiles"] = [round(1 / high, 3), round(1 / low, 3)]
    if goal is None:
        report.show(name, 1 / pairs.ratio, "x bare", **facts)
    else:
        report.at_least(name, 1 / pairs.ratio, "x bare", goal, **facts)
    for side, seconds in (("ours", pairs.ours_s), ("bare", pairs.theirs_s)):
        report.show(f"{name}/{side}", moved_bytes / statistics.median(seconds) / MEBIBYTE, "MiB/s")


def by_disk(report: harness.Report, served: ServedModel, weights: dict[str, Tensor], root: Path) -> None:
    """write_version, verify, read, replace; with and without digests."""
    target = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}

    def ours() -> None:
        shutil.rmtree(root / "ours", ignore_errors=True)
        path = write_version(root / "ours", 1, 1, weights.items(), "checksum", root / "model")
        verify_version(path)
        replace_weights(served, read_weights(served, path))

    def bare() -> None:
        shutil.rmtree(root / "bare", ignore_errors=True)
        (root / "bare").mkdir()
        plain_copy(weights, root / "bare" / "model.safetensors", target)

    moved = total_bytes(weights)
    with without_digests():
        pairs = harness.measure_pairs(ours, bare, clock=time.perf_counter)
    judge_speed(report, "weight_sync/disk", pairs, moved, goal=GOAL)
    report.show("weight_sync/disk/with_digests", moved / median_s(ours) / MEBIBYTE, "MiB/s")
    files = [file for file in (root / "ours").rglob("*") if file.is_file()]
    once = median_s(lambda: manifest.file_digests(files))
    report.show("weight_sync/disk/digest", once, "s", passes="trainer, controller, embedded engine")
    expect_equal(dict(served.module.named_parameters()), weights)
    expect_equal(target, weights)


def plain_copy(weights: dict[str, Tensor], file: Path, target: dict[str, Tensor]) -> None:
    """The least that brings weights through a file: write, fsync, read back into place."""
    with file.open("wb") as out:
        for tensor in weights.values():
            out.write(raw(tensor))
        out.flush()
        os.fsync(out.fileno())
    with file.open("rb") as source:
        for tensor in target.values():
            source.readinto(raw(tensor))


@contextlib.contextmanager
def without_digests() -> Iterator[None]:
    """Nothing is hashed, neither by the writer nor by those who check."""
    with mock.patch.object(manifest, "file_digest", mock.Mock(return_value="")):
        yield


def by_collective(report: harness.Report, weights: dict[str, Tensor], size: Size, url: str, *, loads: bool) -> None:
    """A transfer of a stored version by the controller's code, beside one broadcast."""
    sender = WeightSender(LOOPBACK, None, "gloo", size.bucket_bytes, TIMEOUT_S)
    sender.store(1, weights.items())
    flat = torch.cat([tensor.view(-1).view(torch.uint8) for tensor in weights.values()])
    try:
        with raw_receiver(flat.numel(), loads=loads) as broadcast:
            pairs = harness.measure_pairs(
                lambda: asyncio.run(transfer(url, sender.address)), lambda: broadcast(flat), clock=time.perf_counter
            )
    finally:
        sender.close()
    if loads:
        expect_arrived(weights, url)
    name = "weight_sync/collective" + ("/with_load" if loads else "")
    goal = GOAL if size == FULL and not loads else None
    judge_speed(report, name, pairs, flat.numel(), goal=goal, bucket_mib=size.bucket_bytes // MEBIBYTE)


def memory(report: harness.Report, size: Size, root: Path, url: str) -> None:
    """What a trainer holds beyond its weights while it publishes; a process of its own for each transport."""
    limit = size.bucket_bytes / MEBIBYTE
    for name in TRANSPORTS:
        child = harness.measure_in_child(prepare_publish, name, size, root, url)
        mapped = round(child.extra_peak_bytes / MEBIBYTE, 1)
        extra = child.value / MEBIBYTE
        report.at_most(f"weight_sync/{name}/memory", extra, "MiB", limit, with_mapped_files_mib=mapped)


def prepare_publish(name: str, size: Size, root: Path, url: str) -> Callable[[], int]:
    """In a fresh process: weights, and the call that stores and sends them and returns the memory that it took."""
    torch.set_num_threads(1)
    served = load_model(options(root, seed=2))
    weights = dict(served.module.named_parameters())
    transport = make_transport(name, size, root / f"memory_{name}", root)

    def publish() -> int:
        return harness.peak_above(lambda: store_and_send(transport, weights, url))

    return publish


def make_transport(name: str, size: Size, folder: Path, root: Path) -> Transport:
    if name == "disk":
        return DiskTransport(folder, root / "model", keep_last=2)
    if name == "colocated":
        return SenderTransport(WeightSharer(None, size.bucket_bytes))
    return SenderTransport(WeightSender(LOOPBACK, None, "gloo", size.bucket_bytes, TIMEOUT_S))


def store_and_send(transport: Transport, weights: dict[str, Tensor], url: str) -> None:
    """A publish, and what the trainer does for it until an engine holds the version."""
    path = transport.store(1, 1, gathered(weights), "checksum")
    if isinstance(transport, SenderTransport):
        asyncio.run(transfer(url, path))
    transport.keep([1])


def stall(report: harness.Report, weights: dict[str, Tensor], size: Size, root: Path) -> None:
    """Seconds of the learner's thread in a publish; that the version before it has arrived is not part of it."""
    gather_s = median_s(lambda: [None for _ in gathered(weights)])
    for name in TRANSPORTS:
        transport = make_transport(name, size, root / f"stall_{name}", root)
        seconds, whole = [], []
        for version in range(1, REPEATS + 1):
            handover = Handover(functools.partial(store_and_keep, transport, version))
            start = time.perf_counter()
            handover.give(gathered(weights))
            seconds.append(time.perf_counter() - start)
            handover.finish(wait=True)
            whole.append(time.perf_counter() - start)
        transport.close()
        figures = {"gather_s": round(gather_s, 3), "until_published_s": round(statistics.median(whole), 3)}
        report.show(f"weight_sync/{name}/stall", statistics.median(seconds), "s", **figures)


def store_and_keep(transport: Transport, version: int, tensors: Iterator[tuple[str, Tensor]]) -> None:
    transport.store(version, version, tensors, "checksum")
    transport.keep([version])


def median_s(call: Callable[[], object]) -> float:
    """Wall time, median of a few."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def by_sharing(report: harness.Report, weights: dict[str, Tensor], size: Size, url: str) -> None:
    """A transfer through shared memory: no goal, since nothing bare does the same."""
    sharer = WeightSharer(None, size.bucket_bytes)
    sharer.store(1, ((name, -tensor) for name, tensor in weights.items()))
    try:
        seconds = median_s(lambda: asyncio.run(transfer(url, sharer.address)))
    finally:
        sharer.close()
    expect_arrived({name: -tensor for name, tensor in weights.items()}, url)
    report.show("weight_sync/colocated/ours", total_bytes(weights) / seconds / MEBIBYTE, "MiB/s")


if __name__ == "__main__":
    sys.exit(main())
