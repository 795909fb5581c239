"""`asympo mirror` as on an engine's host of a cluster: refusals, the controller's calls, the end."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import msgspec
import pytest
import torch

from asympo_megatron import protocol
from asympo_megatron.config import RunDir, load_config
from asympo_megatron.errors import ConfigError
from asympo_megatron.launch.mirror import serve_mirror
from asympo_megatron.launch.ports import free_port
from asympo_megatron.sync import verify_version, write_version
from asympo_megatron.testing.polling import wait_until


def config(tmp_path: Path, *overrides: str):
    return load_config("quickstart", [f"run.root={tmp_path}", f"sync.spool_dir={tmp_path / 'spool'}", *overrides])


def test_a_run_without_deltas_needs_no_mirror(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sync.deltas is 0: every version is published whole"):
        serve_mirror(config(tmp_path))


def test_a_port_in_use_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port} .*Set sync.mirror_port"):
            serve_mirror(config(tmp_path, "sync.deltas=3", f"sync.mirror_port={port}"))
    assert list((tmp_path / "spool").iterdir()) == []


def call(port: int, path: str, request: object, token: str) -> tuple[int, bytes]:
    body, headers = msgspec.msgpack.encode(request), {"Authorization": f"Bearer {token}"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_it_serves_until_it_is_told_to_go(tmp_path: Path) -> None:
    port = free_port()
    overrides = ["sync.deltas=3", f"sync.mirror_port={port}", "rollout.controller_token=secret"]
    weights = RunDir.of(config(tmp_path)).weights
    (tmp_path / "config.json").write_text("{}")
    write_version(weights, 3, 3, [("x", torch.ones(5))], "sum", tmp_path)
    arguments = [f"run.root={tmp_path}", f"sync.spool_dir={tmp_path / 'spool'}", *overrides]
    command = [sys.executable, "-m", "asympo_megatron.cli.main", "mirror", "quickstart", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:

        def answers() -> bool:
            assert process.poll() is None, process.communicate()
            try:
                return call(port, "/release", protocol.LeaveGroupRequest("none"), "secret")[0] == 200
            except urllib.error.URLError:
                return False

        wait_until(answers, "the mirror", 120.0, 0.1)
        request = protocol.BringVersionRequest("t", 3)
        status, body = call(port, "/bring", request, "wrong")
        assert (status, b"wrong or missing bearer token" in body) == (401, True)
        status, body = call(port, "/bring", request, "secret")
        assert status == 200
        copy = Path(msgspec.msgpack.decode(body, type=protocol.BringVersionReply).path)
        assert tmp_path / "spool" in copy.parents
        assert verify_version(copy).checksum == "sum"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert list((tmp_path / "spool").iterdir()) == []
    finally:
        process.kill()
        process.wait()
