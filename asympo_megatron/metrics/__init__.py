"""Measurements of a run: statistics, the metrics file, optional sinks, the live view and the report."""

from asympo_megatron.metrics.console import RunConsole
from asympo_megatron.metrics.jsonl import MetricsWriter, Row, read_rows
from asympo_megatron.metrics.report import write_report
from asympo_megatron.metrics.sinks import Sink, open_sinks
from asympo_megatron.parallel.stats import Stat

__all__ = ["MetricsWriter", "Row", "RunConsole", "Sink", "Stat", "open_sinks", "read_rows", "write_report"]
