"""`asympo run` on real SGLang servers: weights by disk and by broadcast, in flight; a server killed in mid-sync."""

import contextlib
import json
import signal
import sqlite3
import sys
import urllib.request
from pathlib import Path

import msgspec
import psutil
import pytest
import yaml
from engine_client import PROMPT, EngineClient
from sglang_servers import PYTHON, server_process

from asympo_megatron.config import RunDir
from asympo_megatron.launch.ports import free_port
from asympo_megatron.rollout.rows import ResponseSummary
from asympo_megatron.sync import list_versions, read_manifest, version_path

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))  # the runner of whole commands

from command_bench import Bench

REWARD = """def score(prompts, responses, answers, metas):
    return [float(sum(map(ord, response)) % 1009) for response in responses]
"""
"""An untrained model earns nothing at spelling; these rewards hardly ever agree, so that every step changes weights."""
STEPS = 12
LONGEST = 600


@pytest.fixture(scope="module")
def bench(models, tmp_path_factory):
    """One group of long responses a step, two groups at a time on an engine: weights change while they run."""
    path = tmp_path_factory.mktemp("run")
    (path / "variety.py").write_text(REWARD)
    config = path / "long.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "run": {"steps": STEPS},
                "model": {"path": str(models["qwen3"]), "init": "hf"},
                "optimizer": {"lr": 1e-3},
                "batch": {"groups_per_step": 1, "group_size": 2, "max_tokens_per_microbatch": 1024},
                "rollout": {
                    "engine": "sglang",
                    "max_lag_steps": 4,
                    "max_in_flight_per_engine": 4,
                    "engine_timeout_s": 20,
                    "sampling": {"max_prompt_tokens": 64, "max_new_tokens": LONGEST},
                    # so that the run waits until an engine holds its last weights
                    "eval": {"interval_steps": STEPS, "prompts": 2},
                },
                "task": {
                    "name": "spell_backward",
                    "size": 2000,
                    "template": "plain",
                    "reward": "variety:score",
                    "options": {"min_word_len": 3, "max_word_len": 3},
                },
                "checkpoint": {"interval_steps": 0},
            }
        )
    )
    bench = Bench(path, config)
    yield bench
    bench.stop()


def clients(server_urls, models) -> list[EngineClient]:
    return [EngineClient(url, models["qwen3"], models["qwen3_b"]) for url in server_urls]


def versions_of_trained(bench, name) -> list[int]:
    """How many weight versions sampled each trained response, from the journal."""
    with sqlite3.connect(RunDir(bench.path / "runs" / name).journal) as journal:
        rows = journal.execute("SELECT summary FROM groups WHERE lease_step IS NOT NULL").fetchall()
    groups = [msgspec.msgpack.decode(summary, type=list[ResponseSummary]) for (summary,) in rows]
    return [len(response.versions) for group in groups for response in group]


@pytest.mark.parametrize("transport", ["disk", "deltas", "collective", "colocated"])
def test_run_trains_responses_that_span_versions(bench, server_urls, models, transport):
    servers = clients(server_urls, models)
    for server in servers:
        server.reset()
    before, sampled_before = servers[0].digest(), servers[0].generate(max_new_tokens=30)["output_ids"]
    urls = f"rollout.engine_urls=[{','.join(server_urls)}]"
    options = [f"run.name={transport}", f"checkpoint.interval_steps={STEPS}", urls]
    if transport == "deltas":
        options += [f"sync.deltas={STEPS}", f"sync.mirror_port={free_port()}", "sync.keep_last=100"]
        bench.start("mirror", str(bench.config), *options)
    else:
        options += [f"sync.transport={transport}"]
    bench.run("run", str(bench.config), *options, timeout_s=500)

    rows = bench.rows(transport)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert len({row["train/weights_checksum"] for row in rows}) == STEPS
    assert max(versions_of_trained(bench, transport)) >= 3

    if transport == "deltas":
        weights = RunDir(bench.path / "runs" / transport).weights
        bases = [read_manifest(version_path(weights, version)).base for version in list_versions(weights)]
        assert bases == [None, *range(STEPS)]

    # what the engine of the last evaluation holds is what the trainer saved last, tensor by tensor
    held = {int(server.call("/model_info")[1]["weight_version"].partition(".")[0]): server for server in servers}
    newest, server = max(held.items())
    assert newest == STEPS
    got = server.digest()
    assert got != before
    assert server.generate(PROMPT, max_new_tokens=30)["output_ids"] != sampled_before
    bench.run("convert", "megatron-to-hf", f"runs/{transport}", f"{transport}-saved")
    server.reset()
    server.update(bench.path / f"{transport}-saved", "saved")
    assert server.digest() == got


def test_asympo_run_starts_its_own_servers(bench):
    """The whole of `asympo run`: it boots the server, waits for it, and leaves no process behind."""
    process = bench.start("run", str(bench.config), "run.name=own", "run.steps=2", f"rollout.engine_python={PYTHON}")
    output, _ = process.communicate(timeout=580)
    assert process.returncode == 0, output[-3000:]
    assert len(bench.rows("own")) == 2
    log = (bench.path / "runs" / "own" / "logs" / "engine0.log").read_text(errors="replace")
    assert "The server is fired up" in log
    assert not [p for p in psutil.process_iter(["cmdline"]) if "own/model" in " ".join(p.info["cmdline"] or [])]


def test_a_server_killed_in_mid_sync_delays_nobody(bench, server_urls, models):
    """Last in the suite: the second server dies while it receives buckets; the run ends on the first one."""
    first, second = clients(server_urls, models)
    first.reset()
    second.reset()
    port = free_port()
    process = bench.start(
        *("run", str(bench.config), "run.name=killed", "sync.transport=collective", "sync.bucket_bytes=20000"),
        *(f"rollout.engine_urls=[{','.join(server_urls)}]", f"rollout.controller_port={port}"),
    )
    victim = server_process(server_urls[1])
    await_second_sync(process, port, server_urls[1])
    for one in [*victim.children(recursive=True), victim]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-3000:]
    rows = bench.rows("killed")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    log = (bench.path / "runs" / "killed" / "logs" / "controller.log").read_text()
    assert f"engine {server_urls[1]} is quarantined" in log
    assert f"engine {server_urls[0]} is quarantined" not in log
    assert first.call("/model_info")[1]["weight_version"] != "default"


def await_second_sync(process, port: int, url: str) -> None:
    """Return while the engine receives a version after its first one."""
    served = False
    while process.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5) as answer,
        ):
            engines = {engine["url"]: engine for engine in json.loads(answer.read())["engines"]}
            state = engines.get(url, {}).get("state")
            served = served or state == "serving"
            if served and state == "syncing":
                return
    raise AssertionError(process.communicate()[0][-3000:])
