"""Starts the processes of one campaign, brings the faults, does what an operator would do, and sees that it goes on."""

import contextlib
import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from chaos_plan import Fault
from chaos_points import Armed, Events, arm, disarm
from chaos_trainer import GATE
from chaos_verdict import Verdict
from chaos_world import World

from asympo_megatron.errors import EXIT_REQUEUE
from asympo_megatron.launch.children import die_with_parent

HANG_S = 90.0
"""No step in this time although every process runs: the run hangs."""
POLL_S = 0.02
STOPPED_S = 0.3
DISK_FULL_S = 1.0
PRELOADED = ["asympo_megatron.trainer.run", "asympo_megatron.rollout.build", "chaos_roles"]


class Hang(Exception):
    """Something that had to happen did not, for HANG_S."""


def process_context() -> Any:
    """Processes are forked from one that has imported everything: a restart costs no imports, and no threads."""
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def enter(home: str, role: str, program: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """First thing in a process: output to a log file; the end of the conductor is its end."""
    die_with_parent(signal.SIGKILL)
    log = os.open(Path(home) / f"{role}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    program(*arguments)


class Conductor:
    """One campaign.

    Args:
        world: its configuration.
        context: of :func:`process_context`.
        programs: role -> (program, arguments); the trainer's and the controller's must be among them.
        hang_s: bound of every wait, counted from the last step.
    """

    def __init__(
        self,
        world: World,
        context: Any,
        programs: dict[str, tuple[Callable[..., None], tuple[Any, ...]]],
        hang_s: float = HANG_S,
    ) -> None:
        self.world, self._context, self._programs, self._hang_s = world, context, programs, hang_s
        self.events = Events(world.path)
        self.processes: dict[str, BaseProcess] = {}
        self.hits: Counter[tuple[str, str, str, str]] = Counter()
        """(role without number, phase, point, kind)."""
        self.missed: list[Fault] = []
        self.counts: Counter[str] = Counter()
        self.verdict = Verdict()
        """Of whoever judges the campaign when it is over."""
        self._gate = self._incarnation = 0
        self._last_step_s = time.monotonic()
        self._steps: dict[int, int] = {}
        self._fired: dict[int, int] = {}
        self._asked_s = 0.0
        self._engines: dict[str, str] = {}

    # -- the campaign

    def run(self, faults: list[Fault]) -> None:
        """Every fault, one after the other, then the run to its last step.

        Raises:
            Hang: what was waited for.
        """
        try:
            self._allow(0)
            for role in self._programs:
                self._start(role)
            self._await(lambda: self._incarnation > 0, "the first trainer attaches", max(self._hang_s, HANG_S))
            for number, fault in enumerate(faults):
                self._bring(number, fault)
            self._await(self._all_serve, "every engine serves again")
            self._allow(self.world.steps)
            self._await(lambda: self._exit_code("trainer") == 0, "the trainer's last step")
            self._end("controller", signal.SIGTERM)
        finally:
            for role in self.processes:
                self._end(role, signal.SIGKILL)
            self.events.poll()

    def _bring(self, number: int, fault: Fault) -> None:
        if fault.role.startswith("engine"):  # one that was hit before may still be on its way back
            self._await(self._all_serve, "every engine serves")
        arm(self.world.path, fault.role, Armed(number, fault.point, fault.kind, fault.skip))
        if fault.phase == "attach":
            self._signal("trainer", signal.SIGTERM)
        while number not in self._fired:
            if self._gate >= self.world.steps:
                disarm(self.world.path, fault.role)
                self.missed.append(fault)
                return
            self._go_on(2, lambda: number in self._fired)
        self.hits[fault.role.rstrip("0123456789"), fault.phase, fault.point, fault.kind] += 1
        self._follow(fault, self._fired[number])
        self._go_on(1)

    def _follow(self, fault: Fault, pid: int) -> None:
        """What an operator, or a batch system, does after a fault."""
        role, kind = fault.role, fault.kind
        if kind == "kill":
            self._await(lambda: self.processes[role].pid != pid, f"{role} is started again")
        elif kind == "replace":
            self._replace_trainer(pid)
        elif kind == "stop" and role == "controller":
            self._second_controller()
            os.kill(pid, signal.SIGCONT)
        elif kind == "stop" and role == "trainer":
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
        elif kind == "stop":
            self._await(lambda: self._state(role) not in ("serving", "syncing"), f"stopped {role} is taken out")
            if len(self.world.engine_ports) > 1:
                self._go_on(1)  # the others are not delayed
            os.kill(pid, signal.SIGCONT)
        elif kind == "mute":
            self._await(lambda: self._state(role) not in ("serving", "syncing"), f"mute {role} is taken out")
            self._end(role, signal.SIGKILL)
        elif kind == "disk_full":
            self._disk_full(role, pid)

    def _replace_trainer(self, pid: int) -> None:
        """The batch system has given the stopped trainer up; later it wakes."""
        old = self.processes.pop("trainer")
        try:
            self._start("trainer")
            self._go_on(2)
        finally:
            os.kill(pid, signal.SIGCONT)
        self._await(lambda: not old.is_alive() or not self.processes["trainer"].is_alive(), "one trainer is refused")
        if old.is_alive():  # it was stopped before it attached, and now attaches: the other one is refused
            old, self.processes["trainer"] = self.processes["trainer"], old
            self.counts["took over again"] += 1
        self._note_refusal(old)

    def _note_refusal(self, old: BaseProcess) -> None:
        old.join()
        self.counts[f"woken trainer ended by {_kind(self._why(old))}"] += 1

    def _second_controller(self) -> None:
        first = self.processes.pop("controller")
        self._start("controller")
        second = self.processes["controller"]
        try:
            second.join(self._hang_s)
        finally:
            self.processes["controller"] = first
        refused = second.exitcode not in (None, 0) and "JournalError" in self._why(second)
        self.counts["second controllers refused" if refused else "second controllers NOT refused"] += 1
        if second.is_alive():
            second.kill()

    def _disk_full(self, role: str, pid: int) -> None:
        """Space is freed after a while, whether the process gave up or not."""
        ends_s = time.monotonic() + DISK_FULL_S
        process = self.processes[role]
        while process.is_alive() and time.monotonic() < ends_s:
            time.sleep(POLL_S)
        self.counts[f"{role} ended by a full disk"] += not process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            limit = resource.RLIM_INFINITY
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))

    # -- waiting

    def _allow(self, step: int) -> None:
        """The trainer may train up to ``step``."""
        self._gate = min(step, self.world.steps)
        temporary = self.world.path / f".{GATE}"
        temporary.write_text(str(self._gate))
        temporary.replace(self.world.path / GATE)

    def _go_on(self, steps: int, or_else: Callable[[], bool] = lambda: False) -> None:
        """Let the trainer do some steps more, and see that it does."""
        self._allow(self._gate + steps)
        self._await(lambda: self._reached() or or_else(), f"step {self._gate}")

    def _reached(self) -> bool:
        process = self.processes["trainer"]
        return self._exit_code("trainer") == 0 or self._steps.get(process.pid or 0, 0) >= self._gate

    def _await(self, condition: Callable[[], bool], what: str, hang_s: float | None = None) -> None:
        self._last_step_s, hang_s = time.monotonic(), hang_s or self._hang_s
        while not condition():
            self._look_after()
            if time.monotonic() > self._last_step_s + hang_s:
                raise Hang(f"{what}: not within {hang_s:g} s; engines: {self._engines}")
            time.sleep(POLL_S)

    def _look_after(self) -> None:
        """Read events, start what has ended, take evicted engines in again."""
        self._read()
        for role, process in list(self.processes.items()):
            if not process.is_alive() and process.exitcode != 0:
                requeued = process.exitcode == EXIT_REQUEUE
                why = "" if requeued or (process.exitcode or 0) < 0 else self._why(process)
                if why:
                    self.counts[f"{role} ended by {_kind(why)}"] += 1
                self._start(role)
        if time.monotonic() > self._asked_s + 0.5:
            self._asked_s = time.monotonic()
            self._engines = self._ask_engines()
            for url in [url for url, state in self._engines.items() if state == "evicted"]:
                self.counts["engines taken in again"] += 1
                self._call("/engines", {"url": url})

    # -- processes

    def _start(self, role: str) -> None:
        program, arguments = self._programs[role]
        self.processes[role] = self._context.Process(
            target=enter, args=(self.world.home, role, program, arguments), name=role
        )
        self.processes[role].start()
        self.counts[f"{role} started"] += 1

    def _end(self, role: str, number: int) -> None:
        self._signal(role, number)
        process = self.processes[role]
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()

    def _signal(self, role: str, number: int) -> None:
        process = self.processes.get(role)
        if process is not None and process.is_alive() and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def _exit_code(self, role: str) -> int | None:
        return self.processes[role].exitcode

    def _why(self, process: BaseProcess) -> str:
        """The reason that a process gave for its end."""
        self._read()
        reasons = [e["why"] for e in self.events.all if e["event"] == "exit" and e["pid"] == process.pid]
        return reasons[-1] if reasons else f"exit code {process.exitcode}"

    def _read(self) -> None:
        for event in self.events.poll():
            if event["event"] == "trained":
                self._steps[event["pid"]] = event["step"]
                self._last_step_s = time.monotonic()
            elif event["event"] == "fault":
                self._fired[event["number"]] = event["pid"]
                self._last_step_s = time.monotonic()

    # -- the controller's view

    def _state(self, role: str) -> str:
        port = self.world.engine_ports[int(role.removeprefix("engine"))]
        return self._engines.get(f"http://127.0.0.1:{port}", "unknown")

    def _all_serve(self) -> bool:
        states = self._engines.values()
        return len(states) == len(self.world.engine_ports) and set(states) <= {"serving"}

    def _ask_engines(self) -> dict[str, str]:
        found = self._call("/status", None)
        if found is None:
            return {}
        self._incarnation = found["incarnation"]
        return {engine["url"]: engine["state"] for engine in found["engines"]}

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(self.world.controller_url + path, data, timeout=1.0) as reply:
                return json.loads(reply.read())
        except (OSError, urllib.error.URLError, ValueError):  # down, stopped or busy: it is asked again
            return None


def _kind(why: str) -> str:
    """The class of the error that ended a process."""
    return why.split(":")[0]
