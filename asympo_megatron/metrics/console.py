"""What a person sees while a run trains: one live screen at a terminal, a plain line every few seconds elsewhere."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asympo_megatron.config import Config
from asympo_megatron.metrics.jsonl import RowTail

PLAIN_INTERVAL_S = 5.0
SPARK_WIDTH = 32
_BARS = "▁▂▃▄▅▆▇█"


class RunConsole:
    """Follows RUN_DIR/metrics.jsonl; call :meth:`update` now and then.

    Args:
        config: of the run that is watched; ``logging.progress: false`` makes this silent.
        run_dir: where its metrics.jsonl grows.
        console: where to draw; the standard output by default.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._steps, self._enabled = config.run.name, config.run.steps, config.logging.progress
        self._tail = RowTail(Path(run_dir) / "metrics.jsonl")
        self._console, self._clock = console or Console(), clock
        self._state = RunState(sampled=config.rollout.source != "supervised")
        self._incarnation: int | None = None
        self._first = (clock(), 0)
        """When this view first saw the trainer, and its step then: the rows of a resumed run are old."""
        self._next_line_s = clock()
        self._live: Live | None = None

    def __enter__(self) -> "RunConsole":
        if self._enabled and self._console.is_terminal:
            self._live = Live(self._screen(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        if self._live is not None:
            self._live.stop()
        elif self._enabled and self._state.unseen:
            self._print_line()

    def update(self) -> None:
        """Read what is new and draw it."""
        if not self._enabled:
            return
        for row in self._tail.poll():
            self._state.take(row)
        if self._state.row is not None and self._state.row.get("incarnation", 0) != self._incarnation:
            self._incarnation = self._state.row.get("incarnation", 0)
            self._first = (self._clock(), self._state.step)
        if self._live is not None:
            self._live.update(self._screen(), refresh=True)
        elif self._state.unseen and self._clock() >= self._next_line_s:
            self._print_line()

    def _print_line(self) -> None:
        self._next_line_s = self._clock() + PLAIN_INTERVAL_S
        self._state.unseen = False
        figures = "  ".join(f"{name} {value}" for name, value in self._state.figures().items())
        self._console.print(
            f"step {self._state.step}/{self._steps}  {figures}", markup=False, highlight=False, soft_wrap=True
        )

    def _screen(self) -> Panel:
        step = self._state.step
        if self._state.row is None:
            return Panel(Text("starting; the first step has not ended yet"), title=self._name, title_align="left")
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(ProgressBar(total=self._steps, completed=step), f"step {step}/{self._steps}  {self._remaining()}")
        grid = Table.grid(padding=(0, 3))
        cells = list(self._state.figures().items())
        for left, right in zip(cells[::2], [*cells[1::2], ("", "")], strict=False):
            grid.add_row(Text(left[0], style="dim"), left[1], Text(right[0], style="dim"), right[1])
        trend = Text.assemble(("reward ", "dim"), (spark(self._state.rewards), "cyan"))
        return Panel(
            Group(head, "", grid, *([trend] if self._state.rewards else [])), title=self._name, title_align="left"
        )

    def _remaining(self) -> str:
        start_s, start_step = self._first
        done, left = self._state.step - start_step, self._steps - self._state.step
        if done <= 0 or left <= 0:
            return ""
        return f"{clock_time((self._clock() - start_s) / done * left)} left"


class RunState:
    """The newest figures of a run, from rows in the order they were written.

    Args:
        sampled: False for supervised steps: reward and lag say nothing there, the loss does.
    """

    def __init__(self, sampled: bool = True) -> None:
        self._sampled = sampled
        self.row: dict[str, Any] | None = None
        self.step = 0
        self.unseen = False
        """Whether anything came that no line has shown."""
        self.rewards: list[float] = []
        self._eval: tuple[int, float] | None = None

    def take(self, row: Mapping[str, Any]) -> None:
        """An older step written again only brings its evaluation, unless a new incarnation does that step again."""
        self.unseen = True
        again = self.row is not None and row.get("incarnation", 0) > self.row.get("incarnation", 0)
        if self.row is None or again or row["step"] >= self.step:
            self.row, self.step = dict(row), row["step"]
            if self._sampled and row.get("reward/mean") is not None:
                self.rewards.append(row["reward/mean"])
        if row.get("eval/accuracy") is not None and (again or self._eval is None or row["eval/step"] >= self._eval[0]):
            self._eval = (row["eval/step"], row["eval/accuracy"])

    def figures(self) -> dict[str, str]:
        """Names and values to show; what the run does not report is left out."""
        row = self.row or {}
        lag = f"{_number(row, 'lag/mean')} (max {_number(row, 'lag/max', '.0f')})"
        found = {
            "reward": _number(row, "reward/mean", ".3f") if self._sampled else None,
            "held-out": f"{self._eval[1]:.3f} at step {self._eval[0]}" if self._eval else None,
            "loss": None if self._sampled else _number(row, "train/loss", ".3f"),
            "lag": lag if self._sampled and row.get("lag/mean") is not None else None,
            "in flight": _number(row, "rollout/in_flight", ".0f"),
            "trained tok/s": _number(row, "train/tokens_per_s", ",.0f"),
            "sampled tok/s": _number(row, "rollout/tokens_per_s", ",.0f"),
            "weights": _number(row, "sync/version", ".0f"),
        }
        return {name: value for name, value in found.items() if value is not None}


def _number(row: Mapping[str, Any], name: str, form: str = ".1f") -> str | None:
    value = row.get(name)
    return None if value is None else format(value, form)


def spark(values: list[float]) -> str:
    """A line of bars for values between 0 and their maximum, newest last, ``SPARK_WIDTH`` at most."""
    if not values:
        return ""
    size = -(-len(values) // SPARK_WIDTH)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    top = max(*means, 1e-9) if len(means) > 1 else max(means[0], 1e-9)
    return "".join(_BARS[min(len(_BARS) - 1, max(0, int(mean / top * len(_BARS))))] for mean in means)


def clock_time(seconds: float) -> str:
    """75 -> 1:15; 3,700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
