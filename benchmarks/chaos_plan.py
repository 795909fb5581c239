"""Which faults a campaign brings, at which points, in which order: a function of the seed."""

import random
from dataclasses import dataclass, replace

from chaos_controller import PIERCED as CONTROLLER_POINTS
from chaos_reward import SPELLS
from chaos_trainer import PIERCED as TRAINER_POINTS

ROLE_PHASES = {
    "controller": {
        "sampling": ("admit:before", "admit:after", "sample:before", "sample:after"),
        "scoring": ("score:before", "score:after", "finish_group:before", "finish_group:after"),
        "lease": ("lease:before", "lease:after", "payload:before", "payload:after"),
        "attach": ("attach:before", "attach:after"),
        "checkpoint": ("commit:before", "commit:after"),
        "publish": ("version:before", "version:after", "publish:before", "publish:after"),
        "mid-sync": ("pause:before", "pause:after", "load:before", "load:after", "resume:before", "resume:after"),
        "journal write": ("journal:uncommitted",),
    },
    "trainer": {
        "lease": ("lease:before", "lease:after", "payload:before", "payload:after"),
        "attach": ("attach:before", "attach:after"),
        "step": ("step:middle", "row:before", "row:after"),
        "checkpoint": (
            "save:unmarked", "save:marked", "save:renamed", "prune:before", "prune:after",
            "commit:before", "commit:after",
        ),
        "publish": (
            "version:before", "version:after", "store:before", "fsync:before", "store:after", "publish:before",
            "publish:after", "prune_weights:before", "prune_weights:after",
        ),
    },
    "engine": {
        "sampling": ("generate:before", "generate:after", "answer:how"),
        "mid-sync": (
            "pause:before", "pause:after", "load:before", "load:read", "load:after", "resume:before", "resume:after",
        ),
    },
}  # fmt: skip
"""What a role is doing, and the points at which it is doing that."""

LIES = ("http_500", "reset", "truncated", "wrong_ids", "duplicate_rid")
CLOCKS = ("clock_forward", "clock_back", "suspend")
FULL_DISK = {
    "trainer": ("store:before", "fsync:before", "step:middle", "commit:before", "row:before"),
    "controller": ("lease:before", "finish_group:before", "admit:before", "publish:before", "commit:before"),
}


@dataclass(frozen=True)
class Fault:
    """One fault: who, where, what; ``phase`` is the row of the table it counts in."""

    role: str
    phase: str
    point: str
    kind: str
    skip: int = 0


def _everywhere(kinds: dict[str, tuple[str, ...]]) -> list[Fault]:
    """Every kind of a role at every point of it."""
    return [
        Fault(role, phase, point, kind)
        for role, phases in ROLE_PHASES.items()
        for phase, points in phases.items()
        for point in points
        for kind in kinds[role]
    ]


def all_faults() -> list[Fault]:
    """Every fault that there is, once."""
    found = _everywhere(
        {"controller": ("kill", "stop"), "trainer": ("kill", "stop", "replace"), "engine": ("kill", "stop")}
    )
    found += [Fault("engine", "answers", "answer:how", kind) for kind in LIES]
    found += [Fault("engine", "answers", "generate:how", kind) for kind in ("slow", "ignores_abort", "mute")]
    found += [Fault("engine", "reward", "answer:how", kind) for kind in SPELLS]
    for role, points in (("controller", "sample:before"), ("trainer", "lease:before"), ("engine", "load:before")):
        found += [Fault(role, "clock", points, kind) for kind in CLOCKS]
    found += [Fault(role, "full disk", point, "disk_full") for role, points in FULL_DISK.items() for point in points]
    return found


def draw(count: int, seed: int, engines: int = 2) -> list[Fault]:
    """``count`` faults in random order: every one once before any comes twice, each at a random visit of its point."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        round_ = all_faults()
        rng.shuffle(round_)
        found += round_
    return [
        replace(
            fault,
            role=fault.role if fault.role != "engine" else f"engine{rng.randrange(engines)}",
            skip=0 if fault.phase == "attach" else rng.randrange(2),
        )
        for fault in found[:count]
    ]


def check_points() -> None:
    """The tables here name only points that the programs have.

    Raises:
        AssertionError: a point that is never reached.
    """
    for role, pierced in (("controller", CONTROLLER_POINTS), ("trainer", TRAINER_POINTS)):
        known = {f"{point}:{when}" for _, _, point in pierced for when in ("before", "after")}
        known |= {"journal:uncommitted", "step:middle", "save:unmarked", "save:marked", "save:renamed", "fsync:before"}
        named = {point for points in ROLE_PHASES[role].values() for point in points}
        assert named <= known, named - known
