"""Starts real SGLang servers for the suite, and stops them."""

import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from engine_client import CONTEXT_LENGTH

from asympo_megatron.launch.sglang import ServerOptions, cpu_arguments, server_command
from asympo_megatron.testing.polling import wait_until

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
        for server in servers:
            wait_until(partial(_is_ready, server), f"{server.url} ready (see {server.log})", BOOT_TIMEOUT_S, 0.5)
        yield servers
    finally:
        for server in servers:
            if server.process.poll() is None:
                server.kill()


def server_process(url: str) -> psutil.Process:
    """The process that serves ``url``, whoever started it."""
    port = url.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "sglang.launch_server" in line and port in line and process.pid != os.getpid():
            return process
    raise AssertionError(f"no server listens on {url}")


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


def _is_ready(server: Server) -> bool:
    if server.process.poll() is not None:
        tail = server.log.read_text(errors="replace")[-3000:]
        raise AssertionError(f"{server.url} did not get ready (exit code {server.process.returncode}):\n{tail}")
    try:
        with urllib.request.urlopen(server.url + "/ready", timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
