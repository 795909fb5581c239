"""Faults: everything dies, stops, lies or fills up at named points, and every prompt is still trained exactly once.

    python benchmarks/chaos.py [--quick] [--save] [--seed N] [--part small|megatron]
    python benchmarks/chaos.py --mutant early_commit|forgetful_lease|no_fence

Engines (scripted), controller (the real one) and trainer (the real loop, client, publisher and checkpoints around a
learner whose weights are a hash of what it was trained on) are processes that speak HTTP. 200 faults, in campaigns of
25: each is armed at a named point of a process, which does it to itself there (chaos_plan.py lists them). Around them
the program does what a batch system does: starts what has ended, frees the disk, takes evicted engines in again.

Then 10 faults on the real trainer (Megatron-Core on the CPU, replayed groups), beside the same run left alone.

The verdict is read from journal, checkpoint, metrics and events: a prompt in no group, never trained and not dropped
with a reason is lost; one trained twice, or weights published by a trainer after its replacement's, duplicated; no step
for 90 s, while what has ended is started again, is hung.

--mutant breaks the product on purpose, and the program must fall short.
--keep leaves the directories of the campaigns.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import harness
from chaos_conductor import HANG_S, Conductor, Hang, enter, process_context
from chaos_megatron import FAULTS, STEPS, checksums, prepare
from chaos_plan import Fault, draw
from chaos_roles import lonely_program, real_programs, small_programs
from chaos_verdict import Verdict, judge, judge_real
from chaos_world import World

from asympo_megatron.launch.ports import free_port

CAMPAIGN, CAMPAIGNS = 25, 8
QUICK, QUICK_REAL = 13, 2
MUTANT_HANG_S = 20.0
GOAL_MINUTES, GOAL_QUICK_MINUTES = 20.0, 2.0
MUTANTS = {
    "early_commit": Fault("trainer", "checkpoint", "save:unmarked", "kill"),
    "forgetful_lease": Fault("trainer", "step", "step:middle", "kill"),
    "no_fence": Fault("trainer", "step", "step:middle", "replace"),
}
"""What breaks the product, and a fault that shows it."""
VARIETIES: tuple[dict[str, Any], ...] = (
    {"max_lag_steps": 1, "pause_mode": "in_place", "checkpoint_every": 2},
    {"max_lag_steps": 3, "pause_mode": "abort", "checkpoint_every": 3, "lag_policy": "drop", "async_save": True},
    {"max_lag_steps": 0, "pause_mode": "retract", "checkpoint_every": 1, "keep_checkpoints": 2},
    {"max_lag_steps": 2, "pause_mode": "in_place", "checkpoint_every": 2, "lag_policy": "strict"},
)


def small_campaign(context: Any, home: Path, faults: list[Fault], variety: int, mutant: str = "") -> Conductor:
    """One campaign on the small trainer; its verdict is :attr:`Conductor.verdict`."""
    (home / "model").mkdir(parents=True)
    (home / "model" / "config.json").write_text("{}")
    world = World(
        str(home),
        "chaos",
        steps=6 * len(faults) + 10,
        controller_port=free_port(),
        engine_ports=(free_port(), free_port()),
        mutant=mutant,
        **VARIETIES[variety % len(VARIETIES)],
    )
    conductor = Conductor(world, context, small_programs(world), MUTANT_HANG_S if mutant else HANG_S)
    hung = []
    try:
        conductor.run(faults)
    except Hang as hang:
        hung.append(str(hang))
    conductor.verdict = judge(world.run_dir.path, conductor.events.all, world.bait, cut_short=bool(hung))
    conductor.verdict.hung += hung
    return conductor


def real_campaign(context: Any, home: Path, faults: list[Fault]) -> Conductor:
    """Faults on `asympo train` and `asympo control`, then the same run left alone."""
    home.mkdir(parents=True)
    prepare(home)
    world = World(str(home), "killed", steps=STEPS, controller_port=free_port(), engine_ports=())
    conductor = Conductor(world, context, real_programs(world))
    try:
        conductor.run(faults)
    except Hang as hang:
        conductor.verdict.hung.append(str(hang))
        return conductor
    program, arguments = lonely_program(world)
    alone = context.Process(target=enter, args=(str(home), "alone", program, arguments))
    alone.start()
    alone.join()
    runs = home / "runs"
    conductor.verdict = judge_real(runs / "killed", conductor.events.all)
    if checksums(runs / "killed") != checksums(runs / "alone"):
        conductor.verdict.redone_differently.append("the killed run ended with other weights than the one left alone")
    return conductor


class Tally:
    """Sums over campaigns."""

    def __init__(self) -> None:
        self.verdict = Verdict()
        self.hits: Counter[tuple[str, str, str, str]] = Counter()
        self.counts: Counter[str] = Counter()
        self.missed: list[Fault] = []

    def add(self, name: str, conductor: Conductor) -> None:
        self.verdict.add(conductor.verdict)
        self.hits += conductor.hits
        self.counts += conductor.counts
        self.missed += conductor.missed
        for problem in [*conductor.verdict.problems, *(f"never reached: {fault}" for fault in conductor.missed)]:
            print(f"# {name}: {problem}", flush=True)


def show(report: harness.Report, tally: Tally, prefix: str, faults: int) -> None:
    """The verdict as figures, then how often each kind of fault hit each phase of each role."""
    verdict = tally.verdict
    report.at_least(f"{prefix}/faults", sum(tally.hits.values()), "faults", faults, never_reached=len(tally.missed))
    for name in ("lost", "duplicated", "hung", "corrupt"):
        report.at_most(f"{prefix}/{name}", len(getattr(verdict, name)), "", 0)
    report.at_most(f"{prefix}/redone_differently", len(verdict.redone_differently), "steps", 0, redone=verdict.redone)
    dropped = sum(verdict.dropped.values())
    why = dict(verdict.dropped)
    report.show(f"{prefix}/groups", verdict.groups, "groups", trained=verdict.trained, dropped=dropped, why=why)
    table: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for (role, phase, _, kind), count in tally.hits.items():
        table[role, phase][kind] += count
    for (role, phase), kinds in sorted(table.items()):
        points = len({point for r, p, point, _ in tally.hits if (r, p) == (role, phase)})
        report.show(f"{prefix}/hits", sum(kinds.values()), "faults", role=role, phase=phase, points=points, **kinds)
    for what, count in sorted(tally.counts.items()):
        report.show(f"{prefix}/seen", count, "times", what=what)


def run_small(report: harness.Report, arguments: argparse.Namespace, context: Any, home: Path) -> None:
    """The campaigns on the small trainer."""
    campaigns, size = (1, QUICK) if arguments.quick else (CAMPAIGNS, CAMPAIGN)
    faults, tally = draw(campaigns * size, arguments.seed), Tally()
    if arguments.mutant:
        campaigns, size, faults = 1, 3, [MUTANTS[arguments.mutant]] * 3
    for k in range(campaigns):
        started_s, part = time.monotonic(), faults[k * size :][:size]
        tally.add(
            f"campaign {k}", small_campaign(context, home / str(k), part, arguments.seed + k, arguments.mutant or "")
        )
        print(f"# campaign {k} took {time.monotonic() - started_s:.0f} s", flush=True)
    show(report, tally, "chaos", campaigns * size)


def run(report: harness.Report, arguments: argparse.Namespace, home: Path) -> None:
    """All campaigns."""
    started_s = time.monotonic()
    context = process_context()
    if arguments.part != "megatron":
        run_small(report, arguments, context, home)
    if arguments.part != "small" and not arguments.mutant:
        chosen, tally = list(FAULTS[:QUICK_REAL] if arguments.quick else FAULTS), Tally()
        tally.add("megatron", real_campaign(context, home / "megatron", chosen))
        show(report, tally, "chaos/megatron", len(chosen))
    minutes = (time.monotonic() - started_s) / 60
    limit = GOAL_QUICK_MINUTES if arguments.quick else GOAL_MINUTES
    report.at_most("chaos/minutes", minutes, "min", limit, seed=arguments.seed, hang_s=HANG_S)


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the faults and their points")
    parser.add_argument("--part", choices=("small", "megatron"), help="only the small trainer, or only the real one")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="break the product: the verdict must notice")
    parser.add_argument("--keep", action="store_true", help="leave the directories of the campaigns")
    arguments = parser.parse_args()
    report = harness.Report("chaos", save=arguments.save)
    home = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        run(report, arguments, home)
    finally:
        if arguments.keep:
            print(f"# {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
