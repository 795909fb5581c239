"""Program of a reward worker: one JSON line in, one JSON line out, behind limits. Run by path, imports no package.

The first line sets it up: {"parent", "path", "kind", "setup", "fenced", "memory_bytes"}; the reply is {"ready": true}
or {"fault": text}. Then every {"token", "job"} is answered by {"token"} with one of "value", "raised" (the scorer
raised), "memory" (the limit was hit; the worker ends) or "fault" (not the response's doing), and "refused": what the
fence stopped meanwhile.
"""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

_REFUSED_EVENTS = frozenset(
    {
        "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn",
        "os.kill", "os.killpg", "signal.pthread_kill", "os.putenv", "os.unsetenv", "os.chdir", "os.chmod", "os.chown",
        "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.truncate", "os.utime",
    }
)  # fmt: skip
_REFUSED_FAMILIES = ("subprocess.", "socket.", "shutil.", "ctypes.", "urllib.", "http.", "ftplib.", "smtplib.", "gc.")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Fence:
    """Audit hook that refuses processes, sockets, signals and writing.

    It stops what an evaluated answer does by ordinary Python; it is a second line behind the process limits, not a
    sandbox against an attacker who knows it.
    """

    def __init__(self) -> None:
        self.refused: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            mode, flags = args[1], args[2]
            writes = any(letter in (mode or "") for letter in "wax+") or (isinstance(flags, int) and flags & _WRITING)
            if not writes:
                return
        elif event not in _REFUSED_EVENTS and not event.startswith(_REFUSED_FAMILIES):
            return
        self.refused.append(event)
        raise PermissionError(f"a scored answer tried {event}")


def main() -> None:
    requests, replies = _take_pipes()
    setup = json.loads(requests.readline())
    _die_with(setup["parent"])
    sys.path[:] = setup["path"]
    try:
        judges = _load_judges()
        judge = judges.build(setup["kind"], setup["setup"])
    except Exception as error:
        _send(replies, {"fault": f"{type(error).__name__}: {error}"})
        return
    fence = Fence()
    if setup["fenced"]:
        _limit_memory(setup["memory_bytes"])
        sys.dont_write_bytecode = True
        sys.addaudithook(fence)
    _send(replies, {"ready": True})
    for line in requests:
        request = json.loads(line)
        fence.refused.clear()
        reply = _judged(judges, judge, request["job"])
        _send(replies, {"token": request["token"], "refused": list(fence.refused), **reply})
        if "memory" in reply:
            return


def _judged(judges: ModuleType, judge: Any, job: dict[str, Any]) -> dict[str, Any]:
    try:
        value = judge(job)
        json.dumps(value)
        return {"value": value}
    except MemoryError:
        return {"memory": True}
    except judges.JudgeFault as error:
        return {"fault": str(error)}
    except BaseException as error:  # SystemExit and KeyboardInterrupt included: an answer may raise anything
        return {"raised": f"{type(error).__name__}: {error}"[:2000]}


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes for the protocol and give printing code stderr and an empty stdin instead."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


def _load_judges() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reward_judges", Path(__file__).with_name("judges.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process with its parent, hung or not. Elsewhere the end of stdin does it."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os._exit(1)


def _limit_memory(allowance_bytes: int) -> None:
    """Limit the address space to what the imports took and the allowance; no core files."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 2**30
    resource.setrlimit(resource.RLIMIT_AS, (used + allowance_bytes,) * 2)


if __name__ == "__main__":
    main()
