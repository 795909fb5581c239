"""What all plots of a report share: colours, axes, smoothing, SVG."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from asympo_megatron.metrics.report.rundata import RunData, Series

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2457c5", "#e08a1e", "#12946b", "#cc3d55", "#7a5bc7", "#98a2b3"
INK, FAINT = "#344054", "#e4e7ec"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "asympo",
    "font.size": 10,
    "axes.edgecolor": "#c3c9d4",
    "axes.labelcolor": INK,
    "axes.labelpad": 6,
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
def new_axes(wide: bool = False, height: float = 2.75) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one or two columns, in the style of the report; nothing global changes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.4 if wide else 5.5, height))
        yield figure, figure.add_subplot()


def to_svg(figure: Figure) -> str:
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


def trend(axes: Axes, line: Series, colour: str, label: str | None = None) -> None:
    """The measured values, faint, under their moving average."""
    if len(line.steps) > _SMOOTHED_PARTS:
        axes.plot(line.steps, line.values, color=colour, alpha=0.25, linewidth=0.9)
    axes.plot(line.steps, smooth(line.values), color=colour, linewidth=2, label=label)


def steps_axis(axes: Axes, label: str = "optimizer step") -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.01)


def log_scale(axes: Axes) -> None:
    """Logarithmic values, with ticks written out: 0.1, 1, 10."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def legend(axes: Axes, columns: int = 4) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, borderaxespad=0.1, handlelength=1.4)


def line_plot(
    name: str, colour: str, title: str, unit: str, caption: str, bottom: float | None = None
) -> Callable[[RunData], Plot | None]:
    """A plot of one metric over the steps."""

    def draw(run: RunData) -> Plot | None:
        line = run.series(name)
        if not line:
            return None
        with new_axes() as (figure, axes):
            trend(axes, line, colour)
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=bottom)
            steps_axis(axes)
            return Plot(title, caption, to_svg(figure))

    return draw
