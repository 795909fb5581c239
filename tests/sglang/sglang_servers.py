"""Starts real SGLang servers for the suite, and stops them."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine_client import CONTEXT_LENGTH

from asympo_megatron.launch.sglang import ServerOptions, cpu_arguments, server_command

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
BOOT_TIMEOUT_S = 600.0
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Server:
    """One started server: the leader of a process group of its own."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """SIGKILL to the server and every process it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@contextmanager
def sglang_servers(model: Path, count: int, logs: Path) -> Iterator[list[Server]]:
    """Boot servers side by side; they are gone when the block ends."""
    servers = [_start(model, logs / f"sglang{number}.log") for number in range(count)]
    try:
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        for server in servers:
            _await_ready(server, deadline)
        yield servers
    finally:
        for server in servers:
            if server.process.poll() is None:
                server.kill()


def _start(model: Path, log: Path) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = ServerOptions(model, "127.0.0.1", port, CONTEXT_LENGTH, "float32")
    command = server_command(PYTHON, options, [*cpu_arguments(CONTEXT_LENGTH), "--max-running-requests", "32"])
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=ENV, start_new_session=True
        )
    return Server(f"http://127.0.0.1:{port}", process, log)


def _await_ready(server: Server, deadline: float) -> None:
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(server.url + "/ready", timeout=10) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)  # nobody to be told by: the port is not open yet
    tail = server.log.read_text(errors="replace")[-3000:]
    raise AssertionError(f"{server.url} did not get ready (exit code {server.process.poll()}):\n{tail}")
