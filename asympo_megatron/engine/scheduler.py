"""Which sequences run, wait or are held, and when weights change. Everything here happens on the model thread.

add ─► waiting ─► prefill ─► running ─► finished
          ▲  retract           │
          └────────────────────┘      pause holds both; a weight update happens between two decode steps
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from asympo_megatron.engine.batch import DecodeBatch, prefill_groups
from asympo_megatron.engine.model import ServedModel, replace_weights, weight_checksums
from asympo_megatron.engine.sequence import Sequence
from asympo_megatron.errors import EngineError

PAUSE_MODES = ("abort", "retract", "in_place")


@dataclass(frozen=True)
class WeightUpdate:
    """Checked weights that wait for a moment between two decode steps."""

    weights: Mapping[str, Tensor]
    path: str
    version: str | None
    """None keeps the label."""
    flush_cache: bool
    done: Callable[[Exception | None], None]


class Scheduler:
    """Continuous batching around one model."""

    def __init__(self, model: ServedModel, model_path: str, max_running: int, seed: int) -> None:
        self.weight_version = "default"
        self.model_path = model_path
        self.paused = False
        self.released = False
        self.generated_tokens = 0
        self.waiting: deque[Sequence] = deque()
        self.finished: list[Sequence] = []
        self._model = model
        self._max_running = max_running
        self._joining: list[Sequence] = []
        self._update: WeightUpdate | None = None
        self.batch = DecodeBatch(model, torch.Generator().manual_seed(seed))

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` would do anything."""
        if self._update is not None:
            return True
        return not (self.paused or self.released) and bool(self.waiting or self.batch.rows)

    def add(self, sequences: list[Sequence]) -> None:
        """Queue new sequences behind those that wait."""
        self.waiting.extend(sequences)

    def abort(self, prefix: str, everything: bool = False) -> None:
        """Finish all sequences whose rid starts with ``prefix``, with the tokens they have."""
        self._abort(lambda rid: everything or rid.startswith(prefix))

    def abort_exactly(self, rids: Collection[str]) -> None:
        """Finish the sequences with these rids."""
        self._abort(lambda rid: rid in rids)

    def pause(self, mode: str) -> None:
        """Hold all generation; what happens to running sequences depends on the mode."""
        self.paused = True
        if mode == "abort":
            self.abort("", everything=True)
        elif mode == "retract":
            for sequence in self.batch.rows:
                sequence.num_retractions += 1
            self.waiting.extendleft(reversed(self.batch.rows))
            self.batch.clear()

    def resume(self) -> None:
        """Continue after a pause."""
        self.paused = False

    def can_flush(self) -> bool:
        """The real server's rule: nothing runs, and nothing waits except during a pause."""
        return not self.batch.rows and (self.paused or not self.waiting)

    def release_memory(self) -> None:
        """Hold generation as if the memory were gone.

        Raises:
            EngineError: sequences are running.
        """
        if not self.can_flush():
            raise EngineError(
                "release_memory_occupation needs an idle engine: pause (abort or retract) or drain first."
            )
        self.released = True

    def resume_memory(self) -> None:
        """Undo :meth:`release_memory`."""
        self.released = False

    def checksums(self) -> dict[str, str]:
        """Digest of every tensor, taken between two decode steps."""
        return weight_checksums(self._model)

    def relabel(self, version: str) -> None:
        """Give the weights another label; tokens from here on carry it."""
        self.weight_version = version
        for sequence in self.batch.rows:
            sequence.begin_span(version)

    def update(self, update: WeightUpdate) -> None:
        """Change weights: at once while paused, otherwise when the running sequences are done (new ones wait)."""
        if self._update is not None:
            update.done(EngineError("another weight update is under way."))
            return
        self._update = update
        self._apply_update()

    def step(self) -> None:
        """One decode step of all running sequences, after prefilling those that can join."""
        self._apply_update()
        if self.paused or self.released:
            return
        if self._update is None and self.waiting:
            self._admit()
        if self.batch.rows:
            self.batch.decode()
            self._after_sampling(self.batch.rows)

    def fail_all(self) -> list[Sequence]:
        """Forget every sequence after an error of the model; returns them."""
        lost = {id(sequence): sequence for sequence in (*self.waiting, *self._joining, *self.batch.rows)}
        self.waiting.clear()
        self._joining = []
        self.batch.clear()
        return [sequence for sequence in lost.values() if sequence.finish_reason is None]

    def _apply_update(self) -> None:
        update, running = self._update, len(self.batch.rows)
        if update is None or (running and not self.paused):
            return
        self._update = None
        replace_weights(self._model, update.weights)
        self.model_path = update.path
        if update.version is not None:
            self.relabel(update.version)
        refused = None
        if running and update.flush_cache:  # the real server's words, and its order: the weights have changed
            refused = EngineError(
                "Weights were updated, but the cache was not flushed because requests are still running or queued. "
                "Retract or finish them, then call /flush_cache."
            )
        update.done(refused)

    def _admit(self) -> None:
        room = self._max_running - len(self.batch.rows)
        self._joining = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        for sequence in self._joining:
            sequence.begin_span(self.weight_version)
        for group in prefill_groups(self._joining):
            self.batch.prefill(group)
            self._after_sampling(group)
        self._joining = []

    def _after_sampling(self, rows: list[Sequence]) -> None:
        self.generated_tokens += len(rows)
        for row in rows:
            token = row.output_ids[-1]
            if token in row.stop_ids:
                row.finish_reason = {"type": "stop", "matched": token}
            elif row.params.stop and self._matches_stop_string(row):
                continue
            elif len(row.output_ids) >= row.max_new_tokens:
                row.finish_reason = {"type": "length", "length": len(row.output_ids)}
        self._collect_running()

    def _matches_stop_string(self, row: Sequence) -> bool:
        stops = [row.params.stop] if isinstance(row.params.stop, str) else row.params.stop or []
        text = self._model.decode(row.output_ids, row.params.skip_special_tokens)
        for stop in stops:
            position = text.find(stop) if stop else -1
            if position >= 0:
                row.finish_reason = {"type": "stop", "matched": stop}
                row.text_end = position
                return True
        return False

    def _abort(self, matches: Callable[[str], bool]) -> None:
        for sequence in (*self.waiting, *self.batch.rows):
            if matches(sequence.rid):
                sequence.abort()
        self.finished += [sequence for sequence in self.waiting if sequence.finish_reason is not None]
        self.waiting = deque(sequence for sequence in self.waiting if sequence.finish_reason is None)
        self._collect_running()

    def _collect_running(self) -> None:
        done = [row for row in self.batch.rows if row.finish_reason is not None]
        if done:
            self.batch.drop(done)
            self.finished += done
