"""What a journal says, for people: read-only, also while a controller is at work on it."""

import sqlite3
from pathlib import Path

from asympo_megatron.config import RunDir
from asympo_megatron.errors import JournalError

_DROPS_SHOWN = 20


def describe_journal(path: str | Path) -> str:
    """Groups by state, leases, versions, evaluations and dropped groups of a journal.

    Args:
        path: journal.sqlite, or the directory that holds it: that of the run, or its rollout.journal_dir.

    Raises:
        JournalError: there is no journal at ``path``, or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        path = RunDir(path).journal
    if not path.is_file():
        raise JournalError(
            f"{path} does not exist; give the directory of a run that has a controller or, where the run sets it, its "
            "rollout.journal_dir, on the controller's host."
        )
    try:
        db = sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True)
        try:
            return "\n".join(_lines(db))
        finally:
            db.close()
    except sqlite3.DatabaseError as error:
        raise JournalError(f"{path} cannot be read as a journal: {error}.") from error


def _lines(db: sqlite3.Connection) -> list[str]:
    meta = dict(db.execute("SELECT key, value FROM meta"))
    states = dict(db.execute("SELECT state, count(*) FROM groups GROUP BY state ORDER BY state"))
    leases, last = db.execute("SELECT count(DISTINCT lease_step), max(lease_step) FROM groups").fetchone()
    lines = [
        f"run {meta.get('run_id')}, data {meta.get('data_hash')}, trainer incarnation {meta.get('incarnation', 0)}",
        f"committed checkpoint: step {meta.get('committed_step', 0)}; oldest kept: step {meta.get('oldest_step', 0)}",
        "groups: " + (", ".join(f"{count} {state}" for state, count in states.items()) or "none"),
        f"leases: {leases}" + (f", the last for step {last}" if leases else ""),
    ]
    for version, step, incarnation, checksum in db.execute(
        "SELECT version, step, incarnation, checksum FROM versions ORDER BY version DESC LIMIT 5"
    ):
        lines.append(f"version {version}: step {step}, incarnation {incarnation}, checksum {checksum}")
    dropped = db.execute("SELECT group_id, prompt_index, reason FROM groups WHERE state='dropped' ORDER BY group_id")
    rows = dropped.fetchall()
    lines += [f"dropped group {group} (prompt {prompt}): {reason}" for group, prompt, reason in rows[-_DROPS_SHOWN:]]
    if len(rows) > _DROPS_SHOWN:
        lines.append(f"and {len(rows) - _DROPS_SHOWN} dropped before")
    return lines
