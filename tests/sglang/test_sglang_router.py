"""A real sglang-router before real servers: weights change under requests that it placed, an engine goes and comes."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sglang_servers import ENV, PYTHON, server_process

from asympo_megatron.launch.ports import free_port
from asympo_megatron.testing.polling import wait_until
from asympo_megatron.testing.tiny_model import VOCAB_SIZE

sys.path.insert(0, str(Path(__file__).parent.parent / "rollout"))  # the world around a controller

from rollout_world import FakeCodec, FakeTask, World, run_async, small_config, world

STEPS = 6
LONGEST = 200
LIMIT_S = 400.0
"""Catches a hang: two servers share the cores with whatever else the machine does."""
NEAR_TIE = 1e-3
"""Servers and transformers differ by some 1e-6 in a logit: two logits this close may swap places."""


@dataclass(frozen=True)
class Served:
    """An engine that runs already; the world neither starts nor stops it."""

    url: str

    async def start(self) -> str:
        return self.url

    async def kill(self) -> None:
        pass


@pytest.fixture
def router_url(tmp_path: Path) -> Iterator[str]:
    """A router that knows no workers."""
    host, port = "127.0.0.1", free_port()
    command = [str(PYTHON), "-m", "sglang_router.launch_router", "--host", host, "--port", str(port)]
    command += ["--prometheus-host", host, "--prometheus-port", str(free_port())]
    command += ["--policy", "round_robin", "--disable-retries"]
    log = tmp_path / "router.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=ENV)
    try:
        wait_until(lambda: b"Starting server" in log.read_bytes(), f"router ready (see {log})", 120.0, 0.2)
        yield f"http://{host}:{port}"
    finally:
        process.kill()
        process.wait(30)


@contextlib.asynccontextmanager
async def routed(tmp_path: Path, url: str, servers: list[str], models: dict[str, Path]) -> Any:
    """A run on the servers: greedy, so that weights and prompt alone say what an answer must be. Versions alternate
    between two models."""
    config = small_config(
        rollout__router_url=url,
        rollout__max_lag_steps=2,
        rollout__engine_timeout_s=20.0,
        rollout__engine_start_timeout_s=120.0,
        rollout__sampling__max_new_tokens=LONGEST,
        rollout__sampling__top_k=1,
        sync__pause_mode="retract",
        sync__timeout_s=60.0,
    )
    task = FakeTask()
    task.codec = FakeCodec([VOCAB_SIZE - 1], VOCAB_SIZE)
    engines: list[Any] = [Served(server) for server in servers]
    async with world(tmp_path / "run", config, engines, task=task) as w:
        w.trainer.path = lambda version: str(weights(models, version))
        await w.trainer.attach()
        await w.trainer.publish(0)
        yield w


def weights(models: dict[str, Path], version: int) -> Path:
    return models["qwen3_b" if version % 2 else "qwen3"]


def wrong_tokens(sample: Any, references: dict[str, torch.nn.Module]) -> list[int]:
    """Positions whose token is not the one that the weights of its version find likeliest."""
    ids, first, wrong = torch.tensor([sample.prompt_ids + sample.ids]), len(sample.prompt_ids) - 1, []
    for span in sample.versions:
        with torch.no_grad():
            logits_TV = references["qwen3_b" if span.version % 2 else "qwen3"](ids).logits[0, first:]
        for position in range(span.start, span.end):
            best = logits_TV[position].max()
            wrong += [position] if logits_TV[position, sample.ids[position]] < best - NEAR_TIE else []
    return wrong


def workers(url: str) -> set[str]:
    with urllib.request.urlopen(url + "/workers", timeout=10) as answer:
        return {worker["url"] for worker in json.load(answer)["workers"]}


async def has_workers(url: str, expected: set[str]) -> None:
    await asyncio.to_thread(wait_until, lambda: workers(url) == expected, f"the router has {expected}", LIMIT_S, 0.1)


async def train(w: World, steps: range, references: dict[str, torch.nn.Module]) -> int:
    """Lease, look at every token, publish; returns how many responses span versions."""
    spanning = 0
    for step in steps:
        while not (reply := await w.trainer.lease(step)).ready:
            pass
        for sample in await w.trainer.payload(reply):
            assert sample.ids
            assert wrong_tokens(sample, references) == []
            spanning += len(sample.versions) > 1
        await w.trainer.publish(step + 1)
    return spanning


def test_weights_change_under_routed_requests(tmp_path, router_url, server_urls, models, references):
    """Whatever engine the router chose, each token is the one that the weights it names sample."""

    async def scenario() -> None:
        async with routed(tmp_path, router_url, server_urls, models) as w:
            await has_workers(router_url, set(server_urls))
            assert await train(w, range(STEPS), references) > 0
            assert {engine.last_error for engine in w.controller.parts.fleet.engines.values()} == {""}
        log = (tmp_path / "router.log").read_text(errors="replace")
        assert log.count("/generate") >= STEPS * 4, "training requests pass the router"

    run_async(scenario(), LIMIT_S)


def test_server_that_hangs_leaves_the_router_and_comes_back(tmp_path, router_url, server_urls, models, references):
    """Its scheduler is stopped: it answers every call but samples nothing."""

    async def scenario() -> None:
        async with routed(tmp_path, router_url, server_urls, models) as w:
            await has_workers(router_url, set(server_urls))
            held = w.controller.parts.fleet.engines[server_urls[1]]
            stopped = schedulers(server_urls[1])
            try:
                for process in stopped:
                    process.send_signal(signal.SIGSTOP)
                await train(w, range(3), references)
                await w.until(lambda: held.quarantines > 0, LIMIT_S)
                # By a token, a pause or a load, whichever it is asked for first.
                assert server_urls[1] in held.last_error
                await has_workers(router_url, {server_urls[0]})
            finally:
                for process in stopped:
                    process.send_signal(signal.SIGCONT)
            await w.until(lambda: held.serving, LIMIT_S)
            await has_workers(router_url, set(server_urls))
            await train(w, range(3, STEPS), references)
            assert w.controller.parts.fleet.engines[server_urls[0]].last_error == ""

    run_async(scenario(), LIMIT_S)


def schedulers(url: str) -> list[psutil.Process]:
    """The processes of a server that compute."""
    children = server_process(url).children(recursive=True)
    found = [child for child in children if "scheduler" in " ".join(child.cmdline()) or "scheduler" in child.name()]
    assert found, [child.cmdline() for child in children]
    return found
