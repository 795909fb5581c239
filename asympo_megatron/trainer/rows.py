"""metrics.jsonl: one row a step, from the learner's figures, the lease and the clock."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from asympo_megatron import protocol
from asympo_megatron.metrics import MetricsWriter, Sink, read_rows

log = logging.getLogger(__name__)

Row = dict[str, Any]
_REMEMBERED = 256
"""Rows kept so that an evaluation, which ends later, can join the row of the step whose weights it judged."""


class MetricsRows:
    """Writes the rows of a run; on every rank but 0 it is given no writer and does nothing.

    ``step`` counts completed optimizer steps: row 0 is the state before training. An evaluation of weights s is added
    to row s by writing that row again (the last row of a step counts).

    Args:
        begun: is told the step at which the run goes on, before any row is written.
    """

    def __init__(
        self, writer: MetricsWriter | None, sinks: list[Sink], begun: Callable[[int], None] | None = None
    ) -> None:
        self._writer, self._sinks, self._begun = writer, sinks, begun
        self._incarnation = 0
        self._recent: dict[int, Row] = {}
        self._started_s = time.time()

    def start(self, incarnation: int, step: int) -> None:
        """Begin at ``step``; the clock of an earlier incarnation goes on.

        The row of ``step`` is written again, so that what was logged after it counts no more.

        Args:
            incarnation: of the trainer, from 1; 0 where nobody counts them but the rows themselves.
            step: completed optimizer steps.
        """
        self._incarnation = incarnation
        if self._writer is None:
            return
        if self._begun is not None:
            self._begun(step)
        rows = read_rows(self._writer.path)
        self._incarnation = incarnation or 1 + max((row.get("incarnation", 0) for row in rows), default=0)
        rows = [row for row in rows if row["step"] <= step]
        self._recent = {row["step"]: row for row in rows[-_REMEMBERED:]}
        self._started_s = time.time() - (rows[-1].get("time_s", 0.0) if rows else 0.0)
        if step in self._recent:
            self._writer.write({**self._recent[step], "incarnation": self._incarnation})  # the sinks have it
        else:
            self._emit({"step": step})

    def write(
        self, step: int, lease: protocol.LeaseReply, figures: dict[str, float], checksum: str, laps: dict[str, float]
    ) -> None:
        """The row of a completed step, and the rows of evaluations that ended since."""
        self._evaluated(lease.evaluations)
        row: Row = {"step": step}
        row.update({f"train/{name}": value for name, value in figures.items()})
        row["train/weights_checksum"] = checksum
        row["train/tokens_per_s"] = figures.get("tokens", 0.0) / laps["time/step_s"]
        row.update(lease.metrics)
        row.update(lag_figures(lease.responses))
        row.update(laps)
        self._emit(row)

    def finish(self, evaluations: list[protocol.Evaluation]) -> None:
        """The last evaluations; closes the sinks."""
        self._evaluated(evaluations)
        for sink in self._sinks:
            sink.close()

    def _evaluated(self, evaluations: list[protocol.Evaluation]) -> None:
        for found in evaluations:
            row = dict(self._recent.get(found.step, {"step": found.step}))
            row["eval/accuracy"] = found.accuracy
            if found.greedy_accuracy is not None:
                row["eval/greedy_accuracy"] = found.greedy_accuracy
            row["eval/step"] = found.step
            row["eval/version"] = found.version
            row["eval/responses"] = found.responses
            row["eval/response_tokens_mean"] = found.mean_tokens
            row["eval/seconds"] = found.seconds
            self._emit(row)

    def _emit(self, row: Row) -> None:
        if self._writer is None:
            return
        row.setdefault("time_s", time.time() - self._started_s)
        row["incarnation"] = self._incarnation
        self._recent[row["step"]] = row
        while len(self._recent) > _REMEMBERED:
            self._recent.pop(next(iter(self._recent)))
        self._writer.write(row)
        for sink in list(self._sinks):
            try:
                sink.write(row)
            except Exception:  # a tracker's server may be down for an hour; metrics.jsonl has every row
                log.exception("%s failed and is left out from now on", type(sink).__name__)
                self._sinks.remove(sink)


def lag_figures(responses: list[protocol.LeasedResponse]) -> Row:
    """Lag over the responses of a step: mean, extremes and the histogram by lag 0, 1, 2, ..."""
    counts = Counter(response.lag for response in responses)
    total = sum(counts.values())
    return {
        "lag/mean": sum(lag * count for lag, count in counts.items()) / total,
        "lag/max": max(counts),
        "lag/min": min(counts),
        "lag/histogram": [counts[lag] for lag in range(max(counts) + 1)],
    }
