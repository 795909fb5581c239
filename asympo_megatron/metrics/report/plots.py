"""Which plots a report shows, in which order."""

from collections.abc import Callable, Sequence

from asympo_megatron.metrics.report import asynchrony, learning
from asympo_megatron.metrics.report.drawing import Plot
from asympo_megatron.metrics.report.rundata import RunData

SECTIONS: Sequence[tuple[str, Sequence[Callable[[RunData], Plot | None]]]] = (
    ("Learning", (learning.headline, learning.loss, learning.j, learning.entropy)),
    ("Stability", (learning.nll, learning.nll_ratio, learning.grad_norm, learning.warmup_loss)),
    ("Asynchrony", (asynchrony.lag_histogram, asynchrony.lag_by_step, asynchrony.spans, asynchrony.in_flight)),
    ("Speed", (asynchrony.throughput, asynchrony.time_parts)),
)


def draw_sections(run: RunData) -> list[tuple[str, list[Plot]]]:
    """Every plot that the run has data for, by section."""
    drawn = [(title, [plot for make in makers if (plot := make(run))]) for title, makers in SECTIONS]
    return [(title, plots) for title, plots in drawn if plots]
