"""Which weight version the engines should hold."""

from collections.abc import Collection, Iterable

from asympo_megatron.rollout.rows import VersionRow


class Targets:
    """The newest published version, except that versions waiting for their evaluation come first, oldest first.

    A version to be evaluated stays the target until its evaluation is done: that is what pins it.
    """

    def __init__(self, newest: VersionRow | None = None, to_evaluate: Iterable[VersionRow] = ()) -> None:
        self.newest = newest
        self._to_evaluate = list(to_evaluate)

    @property
    def current(self) -> VersionRow | None:
        """What every engine should hold now."""
        return self._to_evaluate[0] if self._to_evaluate else self.newest

    @property
    def pinned(self) -> VersionRow | None:
        """The version that is, or is next to be, evaluated."""
        return self._to_evaluate[0] if self._to_evaluate else None

    def publish(self, row: VersionRow, *, evaluate: bool) -> None:
        """A newer version lies on disk."""
        self.newest = row
        if evaluate:
            self._to_evaluate.append(row)

    def want_evaluation(self, row: VersionRow) -> bool:
        """Queue a published version whose evaluation was forgotten; False when it waits already."""
        if row in self._to_evaluate:
            return False
        self._to_evaluate.append(row)
        return True

    def evaluated(self, row: VersionRow) -> None:
        """The evaluation of a version is done."""
        self._to_evaluate = [waiting for waiting in self._to_evaluate if waiting != row]

    def lost(self, row: VersionRow) -> bool:
        """Nobody has these weights any more. True when their evaluation was waited for, and is given up.

        While no later trainer has published, theirs may only be late.
        """
        replaced = self.newest is not None and self.newest.incarnation > row.incarnation
        given_up = replaced and row in self._to_evaluate
        if given_up:
            self.evaluated(row)
        return given_up

    def forget_after(self, step: int, held: Collection[VersionRow | None]) -> None:
        """A new trainer is at ``step``: evaluations of later steps that have not begun will come again.

        So will those of versions that lay in the earlier trainer's memory, unless an engine holds them.
        """
        self._to_evaluate = [
            row
            for k, row in enumerate(self._to_evaluate)
            if (k == 0 or row.step <= step) and (row in held or not row.in_memory)
        ]

    def in_use(self, loading: Iterable[VersionRow | None]) -> list[int]:
        """Versions whose files an engine loads or may load next."""
        rows = [self.newest, *self._to_evaluate, *loading]
        return sorted({row.version for row in rows if row is not None})
