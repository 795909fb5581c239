"""The plots of a report, as SVG. Each is drawn only when the run reports what it needs."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from asympo_megatron.metrics.rundata import RunData, Series, series

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2457c5", "#e08a1e", "#12946b", "#cc3d55", "#7a5bc7", "#98a2b3"
INK, FAINT = "#344054", "#e4e7ec"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "asympo",
    "font.size": 10,
    "axes.edgecolor": "#c3c9d4",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.labelcolor": INK,
    "figure.constrained_layout.use": True,
}
_SMOOTHED_PARTS = 30
"""A smoothed line averages over a window of 1/30 of the run."""


@dataclass(frozen=True)
class Plot:
    """One drawing with its words."""

    title: str
    caption: str
    svg: str
    wide: bool = False


@contextmanager
def _axes(wide: bool = False, height: float = 2.75) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.4 if wide else 5.5, height))
        yield figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """The drawing without XML prolog, scaled by its container, in the font of the page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    return text[text.index("<svg") :].replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Roboto, Arial")


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average; the window shrinks at both ends."""
    window = max(1, len(values) // _SMOOTHED_PARTS)
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _trend(axes: Axes, line: Series, colour: str, label: str | None = None) -> None:
    """The measured values, faint, under their moving average."""
    if len(line.steps) > _SMOOTHED_PARTS:
        axes.plot(line.steps, line.values, color=colour, alpha=0.25, linewidth=0.9)
    axes.plot(line.steps, smooth(line.values), color=colour, linewidth=2, label=label)


def _steps_axis(axes: Axes, label: str = "optimizer step") -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)


def _legend(axes: Axes, columns: int = 4) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, borderaxespad=0.1, handlelength=1.4)


def headline(run: RunData) -> Plot | None:
    reward, accuracy = run.series("reward/mean"), run.series("eval/accuracy")
    if not reward and not accuracy:
        return None
    with _axes(wide=True, height=3.5) as (figure, axes):
        if reward:
            _trend(axes, reward, GREY, "training reward (mean of the step's responses)")
        if accuracy:
            axes.plot(
                accuracy.steps,
                accuracy.values,
                "o-",
                color=BLUE,
                linewidth=2.2,
                markersize=5,
                label="held-out accuracy",
            )
            for index, offset in ((0, (6, -13)), (-1, (-4, -15))):
                axes.annotate(
                    f"{accuracy.values[index]:.1%}",
                    (accuracy.steps[index], accuracy.values[index]),
                    xytext=offset,
                    textcoords="offset points",
                    color=BLUE,
                    fontweight="bold",
                    ha="left" if index == 0 else "right",
                )
        values = np.concatenate([reward.values, accuracy.values])
        if values.min() >= 0 and values.max() <= 1:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("reward, accuracy")
        _steps_axis(axes)
        _legend(axes)
        caption = (
            "Held-out accuracy: sampled answers to prompts never trained on, at one fixed weight version. "
            "Training reward: the responses of each step, which older weights sampled."
        )
        return Plot("Reward and held-out accuracy", caption, _svg(figure), wide=True)


def _line(name: str, colour: str, title: str, unit: str, caption: str) -> Callable[[RunData], Plot | None]:
    def draw(run: RunData) -> Plot | None:
        line = run.series(name)
        if not line:
            return None
        with _axes() as (figure, axes):
            _trend(axes, line, colour)
            axes.set_ylabel(unit)
            _steps_axis(axes)
            return Plot(title, caption, _svg(figure))

    return draw


def nll(run: RunData) -> Plot | None:
    positive, negative = run.series("train/nll_pos"), run.series("train/nll_neg")
    if not positive or not negative:
        return None
    with _axes() as (figure, axes):
        _trend(axes, negative, RED, "negative advantage")
        _trend(axes, positive, GREEN, "positive advantage")
        axes.set_ylabel("nats per token")
        axes.set_ylim(bottom=0)
        _steps_axis(axes)
        _legend(axes)
        caption = "Mean over responses of their average token NLL. Both rising together is the sign of a collapse."
        return Plot("NLL of positives and negatives", caption, _svg(figure))


def nll_ratio(run: RunData) -> Plot | None:
    line = run.series("train/nll_ratio")
    if not line:
        return None
    with _axes() as (figure, axes):
        _trend(axes, line, PURPLE)
        axes.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylabel("negatives / positives")
        if line.values.max() > 30 * max(line.values.min(), 1e-12):
            axes.set_yscale("log")
        _steps_axis(axes)
        caption = (
            "How much larger the loss of negatives is. ASymPO divides it out: every response pulls by its advantage."
        )
        return Plot("Scale imbalance", caption, _svg(figure))


def grad_norm(run: RunData) -> Plot | None:
    line = run.series("train/grad_norm")
    if not line:
        return None
    clip = run.config.optimizer.clip_grad
    with _axes() as (figure, axes):
        _trend(axes, line, BLUE, "before clipping")
        if clip > 0:
            axes.axhline(clip, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"clipped at {clip:g}")
        axes.set_ylabel("L2 norm")
        if line.values.min() > 0 and line.values.max() > 30 * line.values.min():
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        _steps_axis(axes)
        _legend(axes)
        return Plot("Gradient norm", "Of the whole model, over all ranks.", _svg(figure))


def lag_counts(run: RunData) -> np.ndarray:
    """Responses of the whole run by lag 0, 1, 2, ..."""
    lists = [row["lag/histogram"] for row in run.rows if row.get("lag/histogram")]
    total = np.zeros(max((len(counts) for counts in lists), default=0))
    for counts in lists:
        total[: len(counts)] += counts
    return total


def lag_histogram(run: RunData) -> Plot | None:
    counts = lag_counts(run)
    if not counts.sum():
        return None
    bound = run.config.rollout.max_lag_steps
    with _axes() as (figure, axes):
        lags = np.arange(len(counts))
        share = counts / counts.sum()
        bars = axes.bar(lags, share, color=[ORANGE if lag > bound else BLUE for lag in lags], width=0.72)
        axes.bar_label(
            bars, [f"{part:.0%}" if part >= 0.005 else "" for part in share], color=INK, fontsize=9, padding=2
        )
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
        return Plot("Lag of the trained responses", caption, _svg(figure))


def lag_by_step(run: RunData) -> Plot | None:
    mean, largest = run.series("lag/mean"), run.series("lag/max")
    if not mean or not largest or not run.is_rl:
        return None
    bound = run.config.rollout.max_lag_steps
    with _axes() as (figure, axes):
        axes.step(largest.steps, largest.values, color=GREY, linewidth=1.2, where="mid", label="largest")
        _trend(axes, mean, BLUE, "mean")
        axes.axhline(bound, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"bound {bound}")
        axes.set_ylabel("optimizer steps")
        axes.set_ylim(0, max(bound, largest.values.max()) * 1.08 + 0.1)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _steps_axis(axes)
        _legend(axes)
        return Plot("Lag by step", "A lag of 0 everywhere would be synchronous RL.", _svg(figure))


def spans(run: RunData) -> Plot | None:
    mean, largest = run.series("lag/versions_mean"), run.series("lag/versions_max")
    if not mean:
        return None
    with _axes() as (figure, axes):
        if largest:
            axes.step(largest.steps, largest.values, color=GREY, linewidth=1.2, where="mid", label="largest")
        _trend(axes, mean, BLUE, "mean")
        axes.set_ylabel("weight versions")
        axes.set_ylim(bottom=0)
        _steps_axis(axes)
        _legend(axes)
        caption = (
            "Weights change while a response is sampled; it goes on with the new ones. 1: sampled by a single version."
        )
        return Plot("Weight versions inside a response", caption, _svg(figure))


def throughput(run: RunData) -> Plot | None:
    lines = (
        (run.series("train/tokens_per_s"), BLUE, "trainer"),
        (run.series("rollout/tokens_per_s"), ORANGE, "engines"),
    )
    if not any(line for line, _, _ in lines):
        return None
    with _axes() as (figure, axes):
        for line, colour, label in lines:
            if line:
                _trend(axes, line, colour, label)
        axes.set_ylabel("tokens per second")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _steps_axis(axes)
        _legend(axes)
        caption = "Trainer: response tokens trained. Engines: response tokens sampled, all engines together."
        return Plot("Throughput", caption, _svg(figure))


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
    with _axes() as (figure, axes):
        steps = parts[0][2].steps
        axes.stackplot(
            steps,
            [smooth(part.values) for _, _, part in parts],
            labels=[label for label, _, _ in parts],
            colors=[colour for _, colour, _ in parts],
            linewidth=0,
        )
        axes.set_ylabel("seconds per step")
        axes.set_ylim(bottom=0)
        _steps_axis(axes)
        _legend(axes, columns=2)
        return Plot("Where the trainer's time goes", "Moving average over the steps.", _svg(figure))


def warmup_loss(run: RunData) -> Plot | None:
    line = series(run.warmup_rows, "train/loss")
    if not line:
        return None
    with _axes() as (figure, axes):
        _trend(axes, line, GREEN)
        axes.set_ylabel("loss (nats per token)")
        _steps_axis(axes, "optimizer step of the warm start")
        return Plot("Warm start", "Supervised steps before RL, by the same trainer.", _svg(figure))


SECTIONS: Sequence[tuple[str, Sequence[Callable[[RunData], Plot | None]]]] = (
    ("Learning", (
        headline,
        _line("train/J", BLUE, "J", "J", "Mean of advantage x log of the response's average NLL. ASymPO follows its gradient."),
        _line("train/entropy", PURPLE, "Entropy", "nats per token", "Of the policy, over trained tokens. Rising again is a warning."),
    )),
    ("Stability", (nll, nll_ratio, grad_norm, warmup_loss)),
    ("Asynchrony", (lag_histogram, lag_by_step, spans)),
    ("Speed", (throughput, time_parts)),
)  # fmt: skip


def draw(run: RunData) -> list[tuple[str, list[Plot]]]:
    """Every plot that the run has data for, by section."""
    drawn = [(title, [plot for make in makers if (plot := make(run))]) for title, makers in SECTIONS]
    return [(title, plots) for title, plots in drawn if plots]
