"""Reward functions that behave and misbehave, imported by path in the tests of rewards."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path


def equal(prompts, responses, answers, metas):
    return [float(response == answer) for response, answer in zip(responses, answers, strict=True)]


async def equal_async(prompts, responses, answers, metas):
    await asyncio.sleep(0)
    return equal(prompts, responses, answers, metas)


def lengths(prompts, responses, answers, metas):
    """Shows what arrives: half the length of the question, plus a field of the row."""
    return [len(prompt) / 2 + meta["bonus"] for prompt, meta in zip(prompts, metas, strict=True)]


def too_few(prompts, responses, answers, metas):
    return [1.0]


def not_finite(prompts, responses, answers, metas):
    return [float("nan")] * len(responses)


def not_numbers(prompts, responses, answers, metas):
    return ["good"] * len(responses)


def raises(prompts, responses, answers, metas):
    raise KeyError("judge model is down")


def prints(prompts, responses, answers, metas):
    print('{"token": "0", "value": [1.0]}', flush=True)
    return [0.0] * len(responses)


def hangs(prompts, responses, answers, metas):
    threading.Event().wait()


async def hangs_async(prompts, responses, answers, metas):
    await asyncio.Event().wait()


def dies(prompts, responses, answers, metas):
    os._exit(3)


def eats_memory(prompts, responses, answers, metas):
    return [float(len(bytearray(3 << 29)))]  # 1.5 GiB, never touched: only a limit refuses it


def flaky(prompts, responses, answers, metas):
    """Fails until the file named by the row has as many lines as the row says."""
    path = Path(metas[0]["file"])
    with path.open("a") as out:
        out.write("x\n")
    if len(path.read_text().splitlines()) <= metas[0]["failures"]:
        os._exit(1)
    return [1.0] * len(responses)


def sockets(prompts, responses, answers, metas):
    """Number of sockets among the open files."""
    links = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:  # the descriptor of the listing itself
            continue
    return [float(sum(link.startswith("socket:") for link in links))] * len(responses)


def opens_socket(prompts, responses, answers, metas):
    socket.socket()
    return [1.0] * len(responses)


def forges(prompts, responses, answers, metas):
    """Writes a reply of its own into every pipe it finds."""
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b'{"token": "0", "value": [1.0], "refused": []}\n')
        except OSError:
            continue
    return [0.0] * len(responses)


def modules(prompts, responses, answers, metas):
    import sys

    heavy = ("torch", "transformers", "megatron", "asympo_megatron")
    return [float(sum(name in sys.modules for name in heavy))] * len(responses)


def environment(prompts, responses, answers, metas):
    return [float("SECRET_TOKEN" in os.environ)] * len(responses)


NUMBER = 3


def replies(prompt, response, answer, meta):
    """Shows what arrives, until the third turn."""
    turn = len(meta["episode"])
    return None if turn == 2 else f"{prompt}/{response}/{answer}/{meta['bonus']}/{meta['episode']}"


async def replies_async(prompt, response, answer, meta):
    await asyncio.sleep(0)
    return response[::-1]


def replies_number(prompt, response, answer, meta):
    return 7


def replies_nothing(prompt, response, answer, meta):
    return ""


async def replies_bytes(prompt, response, answer, meta):
    return b"\xff".decode(errors="surrogateescape")


def replies_foreign(prompt, response, answer, meta):
    return "½"


def episodes(prompts, responses, answers, metas):
    """Turns before the last one, and the length of the last."""
    return [len(meta["episode"]) + len(text) / 10 for text, meta in zip(responses, metas, strict=True)]


def runs_code(prompts, responses, answers, metas):
    """Start a program that runs for long, say its number, and wait for it."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    told = Path(responses[0])
    told.with_suffix(".tmp").write_text(str(program.pid))
    told.with_suffix(".tmp").rename(told)
    program.wait()
    return [0.0]
