"""What asynchrony buys when responses have a long tail: synchronous, one step ahead and fully asynchronous runs.

    python benchmarks/async_speedup.py [--seeds 0 1 2] [--quick] [--save]

The controller is the real one: admission, fleet, weight sync, SQLite journal, leases. Engines (decoding_engine.py) and
learner are scripted, on a virtual clock (asympo_megatron.testing.virtual_time): nothing depends on the machine.
All parameters are this project's own choice, in the order of magnitude of a model of some 8 billion parameters:

- responses: log-normal length, median 1,500 tokens, sigma 0.9, cap 16,384 (as in packing.py); 64 prompts x 8 a step;
- 4 engines of 64 slots; a decoding iteration takes 7 ms + 0.06 ms a running request; a weight update pauses 1 s;
- a step of the learner takes as long as the engines need for a mean batch with every slot taken: the hardest case for a
  bound, since neither side has time to spare. Publishing and leasing are part of that time.

The bound of a run is max(generation, training) seconds a step: the trained tokens over the engines' full rate, and the
learner's step. Measured over all steps but the first and last 10 (filling and draining; whole runs are shown, too).
Goals: --lag (default 4) steps ahead is at least 2.0 x synchronous, and at 0.95 of the bound, for every seed. Other
lags and other parameters (first seed) stand beside it without a goal. Draws docs/images/async_timeline.png with --save.
"""

import asyncio
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import harness
import matplotlib
import numpy as np
from decoding_engine import DecodingEngine, EngineModel
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scripted_run import CoinScorer, CountingTask, Learner, Step, make_config

from asympo_megatron.rollout import build_controller
from asympo_megatron.rollout.answer import GenerateRequest
from asympo_megatron.testing.virtual_time import run_virtual

MEDIAN, CAP = 1500, 16384
EDGE_STEPS = 10
"""At both ends of a run, not measured."""
GOAL_SPEEDUP, GOAL_OF_BOUND = 2.0, 0.95
PICTURE = harness.ROOT / "docs" / "images" / "async_timeline.png"
PICTURE_S = 900.0


@dataclass(frozen=True)
class World:
    """Everything that is declared about a run, but its lag."""

    seed: int = 0
    sigma: float = 0.9
    engines: int = 4
    engine: EngineModel = field(default_factory=lambda: EngineModel(64, 0.007, 0.00006, 1.0))
    learner_over_engines: float = 1.0
    """Seconds of a learner's step over those of generating a mean batch at full occupancy."""
    groups_per_step: int = 64
    group_size: int = 8
    steps: int = 60
    lag_policy: str = "admission"

    @property
    def full_tokens_per_s(self) -> float:
        return self.engines * self.engine.full_tokens_per_s

    @property
    def responses_per_step(self) -> int:
        return self.groups_per_step * self.group_size

    def lengths(self) -> np.ndarray:
        """Tokens of each response, [prompts, group_size]."""
        shape = (self.steps * self.groups_per_step, self.group_size)
        draw = np.random.default_rng(self.seed).normal(np.log(MEDIAN), self.sigma, shape)
        return np.clip(np.exp(draw).astype(int), 1, CAP)

    def train_s(self) -> float:
        """Seconds of a learner's step."""
        mean = float(self.lengths().mean()) * self.responses_per_step
        return self.learner_over_engines * mean / self.full_tokens_per_s


VARIATIONS = {
    "milder tail (sigma 0.5)": World(sigma=0.5),
    "learner twice as fast": World(learner_over_engines=0.5),
    "learner half as fast": World(learner_over_engines=2.0),
    "weight update of 4 s": World(engine=EngineModel(64, 0.007, 0.00006, 4.0)),
}


@dataclass(frozen=True)
class Course:
    """What a run did."""

    world: World
    max_lag_steps: int
    steps: list[Step]
    engines: list[DecodingEngine]

    @property
    def measured(self) -> list[Step]:
        return self.steps[EDGE_STEPS:-EDGE_STEPS]

    @property
    def step_s(self) -> float:
        """Seconds a step, from lease to lease."""
        begin, end = self.steps[EDGE_STEPS], self.steps[-EDGE_STEPS]
        return (end.leased_s - begin.leased_s) / len(self.measured)

    @property
    def whole_step_s(self) -> float:
        """The same over the whole run, filling and draining included."""
        return self.steps[-1].trained_s / len(self.steps)

    @property
    def bound_s(self) -> float:
        """Seconds a step if engines or learner never waited."""
        tokens = sum(step.tokens for step in self.measured) / len(self.measured)
        return max(tokens / self.world.full_tokens_per_s, self.world.train_s())

    @property
    def of_bound(self) -> float:
        """Steps a second over those of the bound."""
        return self.bound_s / self.step_s

    @property
    def occupancy(self) -> float:
        """Share of the slots in use."""
        begin_s, end_s = self.steps[EDGE_STEPS].leased_s, self.steps[-EDGE_STEPS].leased_s
        slot_s = (end_s - begin_s) * self.world.engines * self.world.engine.slots
        return sum(busy_s(engine.occupancy, begin_s, end_s) for engine in self.engines) / slot_s

    def facts(self) -> dict[str, float]:
        steps = self.measured
        over_bound = sum(step.over_bound for step in steps) / (len(steps) * self.world.responses_per_step)
        return {
            "seed": self.world.seed,
            "max_lag_steps": self.max_lag_steps,
            "step_s": round(self.step_s, 2),
            "whole_run_step_s": round(self.whole_step_s, 2),
            "bound_s": round(self.bound_s, 2),
            "occupancy": round(self.occupancy, 4),
            "lag_mean": round(sum(step.lag_mean for step in steps) / len(steps), 3),
            "lag_max": max(step.lag_max for step in steps),
            "over_bound": round(over_bound, 4),
        }


def busy_s(occupancy: list[tuple[float, int]], begin_s: float, end_s: float) -> float:
    """Integral of running requests over [begin_s, end_s]; the last entry lasts for ever."""
    times = [time for time, _ in occupancy[1:]] + [end_s]
    pieces = zip(occupancy, times, strict=True)
    return sum(running * max(0.0, min(end, end_s) - max(start, begin_s)) for (start, running), end in pieces)


def run(world: World, max_lag_steps: int) -> Course:
    """One run from nothing to its last step."""
    with tempfile.TemporaryDirectory() as home:
        return run_virtual(_run(world, max_lag_steps, Path(home)))


async def _run(world: World, max_lag_steps: int, home: Path) -> Course:
    config = make_config(
        "speedup",
        groups_per_step=world.groups_per_step,
        group_size=world.group_size,
        steps=world.steps,
        max_lag_steps=max_lag_steps,
    )
    config.rollout.lag_policy = world.lag_policy
    config.rollout.max_in_flight_per_engine = world.engine.slots
    config.rollout.sampling.max_new_tokens = CAP
    lengths, train_s = world.lengths(), world.train_s()

    def length_of(request: GenerateRequest) -> int:
        _, _, group, row, _, _ = request.rid.split(".")
        return int(lengths[int(group) % len(lengths), int(row)])  # a group more for each that was dropped

    async def train() -> None:
        await asyncio.sleep(train_s)

    engines = {f"http://engine{k}": DecodingEngine(f"engine{k}", world.engine, length_of) for k in range(world.engines)}
    controller = build_controller(
        config,
        home,
        CountingTask(),
        CoinScorer(),
        list(engines),
        verify=lambda _: None,
        connect=engines.__getitem__,
        behavior_logprobs=False,
    )
    learner = Learner(controller, config, train)
    try:
        await controller.start()
        await learner.run()
    finally:
        await controller.stop()
    return Course(world, max_lag_steps, learner.steps, list(engines.values()))


def compare(report: harness.Report, world: World, lags: list[int], goal_lag: int) -> dict[int, Course]:
    """All lags on one world, with the goals on ``goal_lag``."""
    courses = {lag: run(world, lag) for lag in lags}
    for lag, course in courses.items():
        speedup = courses[0].step_s / course.step_s
        report.show("async_speedup/steps_per_hour", 3600 / course.step_s, "1/h", **course.facts())
        known = {"seed": world.seed, "max_lag_steps": lag}
        if lag == goal_lag:
            report.at_least("async_speedup/over_synchronous", speedup, "x", GOAL_SPEEDUP, **known)
            report.at_least("async_speedup/of_bound", course.of_bound, "fraction", GOAL_OF_BOUND, **known)
        else:
            report.show("async_speedup/over_synchronous", speedup, "x", **known)
            report.show("async_speedup/of_bound", course.of_bound, "fraction", **known)
    return courses


def vary(report: harness.Report, name: str, world: World, goal_lag: int) -> None:
    """The ends of the scale under other parameters, without a goal."""
    synchronous, ahead = run(world, 0), run(world, goal_lag)
    report.show(
        "async_speedup/variation",
        synchronous.step_s / ahead.step_s,
        "x",
        variation=name,
        of_bound=round(ahead.of_bound, 4),
        synchronous_step_s=round(synchronous.step_s, 2),
        **ahead.facts(),
    )


def draw(courses: list[Course], file: Path) -> None:
    """Slots in use and the learner's steps over the first minutes, one panel a run."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        for axes, course in zip(figure.subplots(len(courses), 1, sharex=True), courses, strict=True):
            _panel(axes, course)
        axes.set_xlabel("virtual seconds since the start")
        axes.set_xlim(0, PICTURE_S)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110, metadata={"Software": None})


def _panel(axes: Axes, course: Course) -> None:
    world, lag = course.world, course.max_lag_steps
    grid = np.arange(0.0, PICTURE_S, 1.0)
    running = np.zeros_like(grid)
    for engine in course.engines:
        times, counts = np.array(engine.occupancy).T
        running += counts[np.searchsorted(times, grid, side="right") - 1]
    used = running / (world.engines * world.engine.slots)
    axes.fill_between(grid, used, step="post", color="#2457c5", alpha=0.75, linewidth=0, label="engine slots in use")
    bars = [(step.leased_s, step.trained_s - step.leased_s) for step in course.steps]
    axes.broken_barh(bars, (-0.26, 0.18), color="#e08a1e", edgecolor="white", label="learner trains (one bar a step)")
    for begin_s, end_s in course.engines[0].updates:
        axes.axvspan(begin_s, end_s, ymin=0.2, color="#cc3d55", alpha=0.8, linewidth=0)
    axes.plot([], [], color="#cc3d55", linewidth=2, label="weight update")
    axes.set_ylim(-0.32, 1.05)
    axes.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    name = "synchronous" if lag == 0 else f"{lag} step{'s' * (lag > 1)} ahead"
    done = sum(step.trained_s <= PICTURE_S for step in course.steps)
    axes.set_title(f"max_lag_steps {lag} ({name}): {done} steps done in {PICTURE_S:g} s", loc="left", fontsize=9.5)


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lag", type=int, default=4, help="max_lag_steps of the fully asynchronous run")
    arguments = parser.parse_args()
    report = harness.Report("async_speedup", save=arguments.save)
    lags = sorted({0, 1, arguments.lag, 2 * arguments.lag})
    for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
        courses = compare(report, World(seed=seed), lags, arguments.lag)
        if arguments.save and seed == arguments.seeds[0]:
            draw([courses[lag] for lag in (0, 1, arguments.lag)], PICTURE)
    if not arguments.quick:
        for name, world in VARIATIONS.items():
            vary(report, name, replace(world, seed=arguments.seeds[0]), arguments.lag)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
