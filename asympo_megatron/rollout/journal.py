"""The controller's durable store: one SQLite file (WAL) with one owner.

Lease, commit, attach and publish are on disk before they are answered (``synchronous=FULL``); admissions and finished
groups use NORMAL, which a crash of the process survives, and which the next FULL write makes durable.
Keep the file on a local disk: SQLite's WAL does not work on network file systems.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from asympo_megatron.errors import JournalError
from asympo_megatron.protocol import Evaluation
from asympo_megatron.rollout.owner import take_ownership
from asympo_megatron.rollout.rows import GroupRow, GroupState, ResponseSummary, StoredGroup, VersionRow

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS groups (
    group_id INTEGER PRIMARY KEY, prompt_index INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT,
    lease_step INTEGER, summary BLOB, payload BLOB);
CREATE INDEX IF NOT EXISTS groups_by_lease ON groups (lease_step);
CREATE INDEX IF NOT EXISTS groups_leased ON groups (lease_step) WHERE state='leased';
CREATE INDEX IF NOT EXISTS groups_with_tokens ON groups (lease_step) WHERE payload IS NOT NULL;
CREATE TABLE IF NOT EXISTS versions (
    version INTEGER PRIMARY KEY, step INTEGER NOT NULL, incarnation INTEGER NOT NULL, checksum TEXT NOT NULL,
    path TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS evaluations (
    version INTEGER PRIMARY KEY, step INTEGER NOT NULL, checksum TEXT NOT NULL, result BLOB NOT NULL,
    incarnation INTEGER, lease_step INTEGER);
"""
_SUMMARY = msgspec.msgpack.Decoder(list[ResponseSummary])
_PAYLOAD = msgspec.msgpack.Decoder(StoredGroup)
_EVALUATION = msgspec.msgpack.Decoder(Evaluation)


class Journal:
    """Owner of ``journal.sqlite``; every change of a group's state is one transaction.

    Args:
        path: the SQLite file; created when missing.
        run_id: name of the run it belongs to.
        data_hash: hash of the configuration that decides which groups the run sees.

    Raises:
        JournalError: another controller owns the file, or it belongs to another run or data configuration.
    """

    def __init__(self, path: str | Path, run_id: str, data_hash: str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = take_ownership(self.path)
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
            self._durable: bool | None = None
            self.incarnation = int(self._meta("incarnation", "0"))
            """Number of the newest trainer that attached; 0 before the first."""
            self._check_owner(run_id, data_hash)
        except sqlite3.DatabaseError as error:
            os.close(self._lock)
            raise JournalError(
                f"{self.path} is not a usable journal ({error}). Restore it or start a new run."
            ) from error
        except JournalError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file and give the ownership up."""
        self._db.close()
        os.close(self._lock)

    # -- meta

    @property
    def committed_step(self) -> int:
        """Step of the newest checkpoint that was committed."""
        return int(self._meta("committed_step", "0"))

    @property
    def oldest_step(self) -> int:
        """Step of the oldest checkpoint still kept: groups leased before it have no tokens any more."""
        return int(self._meta("oldest_step", "0"))

    # -- groups

    def rows(self) -> Iterator[GroupRow]:
        """Every group in the order of admission, without its tokens; where these are gone, without its responses."""
        query = (
            "SELECT group_id, prompt_index, state, reason, lease_step, "
            "CASE WHEN payload IS NOT NULL THEN summary END, payload IS NULL FROM groups ORDER BY group_id"
        )
        for gid, index, state, reason, step, summary, pruned in self._db.execute(query):
            responses = [] if summary is None else _SUMMARY.decode(summary)
            yield GroupRow(gid, index, GroupState(state), reason, step, responses, bool(pruned))

    def admit(self, groups: Iterable[tuple[int, int]]) -> None:
        """Record new groups, (group_id, prompt_index) each, before their first request leaves."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO groups (group_id, prompt_index, state) VALUES (?, ?, 'in_flight')", list(groups)
            )

    def finish_group(self, group_id: int, stored: StoredGroup, summary: Sequence[ResponseSummary]) -> None:
        """A group is scored and waits for a lease."""
        encode = msgspec.msgpack.encode
        with self._transaction():
            self._db.execute(
                "UPDATE groups SET state='ready', summary=?, payload=? WHERE group_id=? AND state='in_flight'",
                (encode(summary), encode(stored), group_id),
            )

    def drop(self, reasons: Mapping[int, str]) -> None:
        """Groups that will never be trained, each with its reason; their rows stay, their tokens go."""
        with self._transaction():
            self._drop(reasons)

    def lease(self, step: int, group_ids: Sequence[int], dropped: Mapping[int, str]) -> None:
        """Bind groups to the batch of ``step``, together with the decision to drop others."""
        with self._transaction(durable=True):
            self._drop(dropped)
            changed = self._db.executemany(
                "UPDATE groups SET state='leased', lease_step=? WHERE group_id=? AND state='ready'",
                [(step, group_id) for group_id in group_ids],
            ).rowcount
            if changed != len(group_ids):
                raise JournalError(f"lease {step}: {changed} of {len(group_ids)} groups were ready in {self.path}.")

    def payload(self, group_id: int) -> StoredGroup:
        """The tokens of a group.

        Raises:
            JournalError: no such group, not scored yet, or pruned.
        """
        found = self._db.execute("SELECT payload FROM groups WHERE group_id=?", (group_id,)).fetchone()
        if found is None or found[0] is None:
            raise JournalError(f"the journal holds no tokens of group {group_id}: it is unknown, unfinished or pruned.")
        return _PAYLOAD.decode(found[0])

    # -- trainer

    def attach(self, resumed_step: int) -> int:
        """A trainer takes over at ``resumed_step``: commit what is older, re-open what is not. Returns its incarnation.

        Evaluations that went with a lease which is done again are delivered again: the rows that the dead trainer wrote
        for them are gone. Those of later weights wait until these weights come again (:meth:`reopen_evaluation`).

        Raises:
            JournalError: leases below ``resumed_step`` are missing, or re-opened ones have lost their tokens.
        """
        self._check_resume(resumed_step)
        incarnation = self.incarnation + 1
        with self._transaction(durable=True):
            self._set("incarnation", str(incarnation))
            self._set("committed_step", str(resumed_step))
            self._db.execute(
                "UPDATE groups SET state='committed' WHERE state='leased' AND lease_step < ?", (resumed_step,)
            )
            self._db.execute("UPDATE groups SET state='leased' WHERE lease_step >= ?", (resumed_step,))
            self._db.execute(
                "UPDATE evaluations SET incarnation=NULL, lease_step=NULL WHERE lease_step >= ? AND step <= ?",
                (resumed_step, resumed_step),
            )
        self.incarnation = incarnation
        return incarnation

    def commit(self, step: int, oldest_step: int) -> None:
        """A checkpoint of ``step`` is final; forget the tokens that no kept checkpoint can ask for again.

        Naming an earlier one again changes nothing.
        """
        with self._transaction(durable=True):
            self._set("committed_step", str(max(step, self.committed_step)))
            self._set("oldest_step", str(max(oldest_step, self.oldest_step)))
            self._db.execute("UPDATE groups SET state='committed' WHERE state='leased' AND lease_step < ?", (step,))
            self._db.execute(
                "UPDATE groups SET payload=NULL WHERE lease_step < ? AND payload IS NOT NULL", (min(step, oldest_step),)
            )

    # -- versions and evaluations

    def allocate_version(self) -> int:
        """A version number that was never given out before."""
        version = int(self._meta("next_version", "0"))
        with self._transaction(durable=True):
            self._set("next_version", str(version + 1))
        return version

    @property
    def next_version(self) -> int:
        """The number that the next new version will get."""
        return int(self._meta("next_version", "0"))

    def publish(self, row: VersionRow) -> None:
        """Record that the weights of a version lie complete on disk."""
        with self._transaction(durable=True):
            self._db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?)", msgspec.structs.astuple(row))

    def versions(self) -> list[VersionRow]:
        """Every published version, oldest first."""
        query = "SELECT version, step, incarnation, checksum, path FROM versions ORDER BY version"
        return [VersionRow(*row) for row in self._db.execute(query)]

    def record_evaluation(self, result: Evaluation, checksum: str) -> None:
        """Keep a finished evaluation until a lease reply has carried it."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO evaluations (version, step, checksum, result) VALUES (?, ?, ?, ?)",
                (result.version, result.step, checksum, msgspec.msgpack.encode(result)),
            )

    def has_evaluation(self, step: int, checksum: str) -> bool:
        """Whether these weights were evaluated."""
        query = "SELECT 1 FROM evaluations WHERE step=? AND checksum=?"
        return self._db.execute(query, (step, checksum)).fetchone() is not None

    def reopen_evaluation(self, step: int, checksum: str) -> bool:
        """True when these weights were evaluated before; this trainer then gets the result, too, once."""
        with self._transaction():
            self._db.execute(
                "UPDATE evaluations SET incarnation=NULL, lease_step=NULL "
                "WHERE step=? AND checksum=? AND incarnation < ?",
                (step, checksum, self.incarnation),
            )
        return self.has_evaluation(step, checksum)

    def deliver_evaluations(self, incarnation: int, lease_step: int) -> list[Evaluation]:
        """Evaluations that go with the lease of ``lease_step``; asking again gives the same ones and newer ones.

        Those of later weights, which a trainer before this one had, wait for their step: its row is written once more.
        """
        with self._transaction():
            self._db.execute(
                "UPDATE evaluations SET incarnation=?, lease_step=? WHERE lease_step IS NULL AND step <= ?",
                (incarnation, lease_step, lease_step),
            )
        query = "SELECT result FROM evaluations WHERE incarnation=? AND lease_step=? ORDER BY version"
        return [_EVALUATION.decode(blob) for (blob,) in self._db.execute(query, (incarnation, lease_step))]

    # -- inside

    def _check_owner(self, run_id: str, data_hash: str) -> None:
        """A journal in which nothing happened yet may change hands: a first start with a wrong value costs nothing."""
        unused = self._db.execute("SELECT NOT EXISTS (SELECT 1 FROM groups)").fetchone()[0] and not self.incarnation
        for key, got in (("run_id", run_id), ("data_hash", data_hash)):
            known = self._meta(key, got)
            if known != got and not unused:
                raise JournalError(
                    f"{self.path} has {key} {known!r}, this run has {got!r}: seed, batch, task, model, advantage or "
                    "sampling changed. Set run.name to a new name (and rollout.journal_dir, where it is set, to a new "
                    "directory), or restore the old values."
                )
        with self._transaction(durable=True):
            self._set("run_id", run_id)
            self._set("data_hash", data_hash)

    def _check_resume(self, step: int) -> None:
        (steps,) = self._db.execute(
            "SELECT count(DISTINCT lease_step) FROM groups WHERE lease_step < ?", (step,)
        ).fetchone()
        if steps != step:
            raise JournalError(
                f"the trainer resumes at step {step}, but {self.path} knows {steps} leases before it: the journal was "
                "removed or belongs to another run. Restore it, or start anew under another run.name."
            )
        query = "SELECT min(lease_step) FROM groups WHERE lease_step >= ? AND payload IS NULL"
        (pruned,) = self._db.execute(query, (step,)).fetchone()
        if pruned is not None:
            raise JournalError(
                f"the trainer resumes at step {step}, but the groups of step {pruned} were pruned after the commit "
                f"that named {self.oldest_step} as the oldest checkpoint. Resume from a newer checkpoint."
            )

    def _drop(self, reasons: Mapping[int, str]) -> None:
        self._db.executemany(
            "UPDATE groups SET state='dropped', reason=?, payload=NULL WHERE group_id=?",
            [(reason, group_id) for group_id, reason in reasons.items()],
        )

    def _meta(self, key: str, default: str) -> str:
        found = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return default if found is None else str(found[0])

    def _set(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        try:
            if durable is not self._durable:
                self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:  # a full disk has ended it already
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise JournalError(
                    f"{self.path} could not be written: {error}. What it held before is safe. Free space on its file "
                    "system and start the controller again."
                ) from error
            raise
