"""What the controller knows about itself: figures for metrics.jsonl, and the status for people."""

from collections.abc import Callable
from typing import Any

from asympo_megatron.rollout.parts import Parts


class Figures:
    """The controller's own rows of metrics.jsonl.

    Args:
        parts: the controller's inside.
        clock: seconds, monotonic.
    """

    def __init__(self, parts: Parts, clock: Callable[[], float]) -> None:
        self._parts, self._clock = parts, clock
        self._mark_s, self._mark_tokens = clock(), 0
        self._tokens_per_s: float | None = None
        self._discarded: dict[str, float] = {}

    def batch_formed(self) -> None:
        """Begin a new interval of the figures that run from batch to batch."""
        self._discarded = self._parts.ledger.discards.take()
        if self._parts.requester is None:
            return
        now_s, tokens = self._clock(), self._parts.requester.tokens_sampled
        self._tokens_per_s = (tokens - self._mark_tokens) / max(now_s - self._mark_s, 1e-9)
        self._mark_s, self._mark_tokens = now_s, tokens

    def now(self) -> dict[str, float]:
        """The figures of this moment."""
        parts, groups = self._parts, self._parts.ledger.groups
        figures: dict[str, float] = {
            "rollout/in_flight": parts.fleet.in_flight,
            "rollout/ready": len(groups.ready),
            "rollout/dropped": len(groups.dropped),
            **self._discarded,
        }
        if self._tokens_per_s is not None:
            figures["rollout/tokens_per_s"] = self._tokens_per_s
        if parts.scorer is not None:
            figures.update(parts.scorer.metrics())
        if parts.syncer is not None:
            figures["sync/seconds"] = parts.syncer.last_sync_s
        versions = [engine.weights.version for engine in parts.fleet.serving if engine.weights is not None]
        if versions:
            figures["sync/version"] = min(versions)
        return figures


def status(parts: Parts, figures: dict[str, float]) -> dict[str, Any]:
    """What a person wants to know, as JSON."""
    groups, failure = parts.ledger.groups, parts.background.failure
    newest, pinned = parts.targets.newest, parts.targets.pinned
    return {
        "run": parts.config.run.name,
        "step": groups.next_step,
        "steps": parts.config.run.steps,
        "incarnation": parts.journal.incarnation,
        "committed_step": parts.journal.committed_step,
        "weights_step": parts.fleet.step,
        "published_version": None if newest is None else newest.version,
        "evaluating_version": None if pinned is None else pinned.version,
        "groups": {"in_flight": len(groups.in_flight), "ready": len(groups.ready), "dropped": len(groups.dropped)},
        "metrics": figures,
        "failure": None if failure is None else str(failure),
        "engines": [
            {
                "url": engine.url,
                "state": engine.state.value,
                "version": None if engine.weights is None else engine.weights.version,
                "in_flight": engine.in_flight,
                "last_error": engine.last_error,
            }
            for engine in parts.fleet.engines.values()
        ],
    }
