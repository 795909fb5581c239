"""Plots of lag, throughput and time. None: the run does not report it."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from asympo_megatron.metrics.report.drawing import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    Plot,
    legend,
    line_plot,
    new_axes,
    steps_axis,
    to_svg,
    trend,
)
from asympo_megatron.metrics.report.rundata import RunData, Series

_TIME_BARS = 40


def lag_counts(run: RunData) -> np.ndarray:
    """Responses of the whole run by lag 0, 1, 2, ..."""
    lists = [row["lag/histogram"] for row in run.rows if row.get("lag/histogram")]
    total = np.zeros(max((len(counts) for counts in lists), default=0))
    for counts in lists:
        total[: len(counts)] += counts
    return total


def lag_histogram(run: RunData) -> Plot | None:
    counts = lag_counts(run)
    if not counts.sum() or not run.series("lag/mean"):
        return None
    bound = run.config.rollout.max_lag_steps
    with new_axes() as (figure, axes):
        lags = np.arange(len(counts))
        share = counts / counts.sum()
        bars = axes.bar(lags, share, color=[ORANGE if lag > bound else BLUE for lag in lags], width=0.72)
        axes.bar_label(bars, [_percent(part) for part in share], color=INK, fontsize=9, padding=2)
        axes.axvline(bound + 0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"bound {bound}", (bound + 0.5, 1), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
            va="top", color=INK, fontsize=9.5,
        )  # fmt: skip
        axes.set_xlim(-0.6, max(len(counts) - 1, bound) + 1.3)
        axes.set_xlabel("lag (optimizer steps)")
        axes.set_ylabel("share of responses")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, share.max() * 1.14)
        caption = "Step that trained a response, minus the step of the oldest weights that sampled any of its tokens."
        return Plot("Lag of the trained responses", caption, to_svg(figure))


def _percent(part: float) -> str:
    if part == 0:
        return ""
    return f"{part:.0%}" if part >= 0.01 else "<1%"


def lag_by_step(run: RunData) -> Plot | None:
    mean, largest = run.series("lag/mean"), run.series("lag/max")
    if not mean or not largest:
        return None
    bound = run.config.rollout.max_lag_steps
    with new_axes() as (figure, axes):
        axes.step(largest.steps, largest.values, color=GREY, linewidth=1.2, where="mid", label="largest")
        trend(axes, mean, BLUE, "mean")
        axes.axhline(bound, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"bound {bound}")
        axes.set_ylabel("optimizer steps")
        axes.set_ylim(0, max(bound, largest.values.max()) * 1.08 + 0.1)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        steps_axis(axes)
        legend(axes)
        return Plot("Lag by step", "A lag of 0 everywhere would be synchronous RL.", to_svg(figure))


def spans(run: RunData) -> Plot | None:
    line = run.series("rollout/spanning_fraction")
    if not line:
        return None
    with new_axes() as (figure, axes):
        trend(axes, line, PURPLE)
        axes.set_ylabel("share of responses")
        axes.set_ylim(0, max(0.05, line.values.max() * 1.05))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        steps_axis(axes)
        caption = "Sampled by two or more weight versions: weights changed on the way and the response went on."
        return Plot("Responses that span weight versions", caption, to_svg(figure))


def throughput(run: RunData) -> Plot | None:
    lines = (
        (run.series("train/tokens_per_s"), BLUE, "trainer"),
        (run.series("rollout/tokens_per_s"), ORANGE, "engines"),
    )
    if not any(line for line, _, _ in lines):
        return None
    with new_axes() as (figure, axes):
        for line, colour, label in lines:
            if line:
                trend(axes, line, colour, label)
        axes.set_ylabel("tokens per second")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        steps_axis(axes)
        legend(axes)
        caption = "Trainer: response tokens trained. Engines: response tokens sampled, all engines together."
        return Plot("Throughput", caption, to_svg(figure))


TIMES = (
    ("time/wait_s", "waiting for responses", GREY),
    ("time/train_s", "forward, backward, optimizer", BLUE),
    ("time/publish_s", "publishing weights", ORANGE),
    ("time/checkpoint_s", "checkpoint", PURPLE),
)


def times(run: RunData) -> list[tuple[str, str, Series]]:
    """Parts of a step that were reported: label, colour, seconds."""
    found = [(label, colour, run.series(name)) for name, label, colour in TIMES]
    longest = max(len(part.steps) for _, _, part in found)
    return [entry for entry in found if entry[2] and len(entry[2].steps) == longest]


def time_parts(run: RunData) -> Plot | None:
    parts = times(run)
    if not parts:
        return None
    steps = parts[0][2].steps
    edges = np.linspace(0, len(steps), min(_TIME_BARS, len(steps)) + 1).astype(int)
    centres, widths = _bars(steps, edges)
    with new_axes() as (figure, axes):
        bottom = np.zeros(len(centres))
        for label, colour, part in parts:
            height = np.add.reduceat(part.values, edges[:-1]) / np.diff(edges)
            axes.bar(centres, height, widths, bottom=bottom, color=colour, label=label, linewidth=0)
            bottom += height
        axes.set_ylabel("seconds per step")
        _cap(axes, centres, bottom)
        axes.grid(visible=False, axis="x")
        steps_axis(axes)
        legend(axes, columns=2)
        caption = (
            f"Mean over about {np.diff(edges).max()} steps a bar." if len(steps) > _TIME_BARS else "One bar a step."
        )
        return Plot("Where the trainer's time goes", caption, to_svg(figure))


def _cap(axes: Axes, centres: np.ndarray, totals: np.ndarray) -> None:
    """Keep a few very high bars (the first one waits for engines to start) from flattening the rest."""
    usual = 1.4 * float(np.quantile(totals, 0.9))
    if totals.max() < 1.5 * usual:
        axes.set_ylim(bottom=0)
        return
    axes.set_ylim(0, usual)
    for centre, total in zip(centres, totals, strict=True):
        if total > usual:
            axes.annotate(
                f"{total:.1f} s",
                (centre, usual),
                xytext=(6, -2),
                textcoords="offset points",
                va="top",
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )


def _bars(steps: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres and widths, in steps, of bars that cover the slices between ``edges``."""
    left, right = steps[edges[:-1]] - 0.5, steps[edges[1:] - 1] + 0.5
    return (left + right) / 2, (right - left) * 0.86


in_flight = line_plot(
    "rollout/in_flight",
    ORANGE,
    "In flight",
    "responses",
    "Responses being sampled when the step's batch was handed out.",
    bottom=0,
)
