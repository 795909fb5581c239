"""report.html: what happened in a run, on one page that needs nothing else."""

from asympo_megatron.metrics.report.write import write_report

__all__ = ["write_report"]
