"""The journal: one owner, one run, and a state that survives a crash at any point."""

import multiprocessing
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asympo_megatron.errors import JournalError
from asympo_megatron.protocol import Evaluation
from asympo_megatron.records import Group, Response, VersionSpan
from asympo_megatron.rollout import describe_journal
from asympo_megatron.rollout.admission import LagRule
from asympo_megatron.rollout.journal import Journal
from asympo_megatron.rollout.ledger import Ledger, recover
from asympo_megatron.rollout.rows import GroupRow, GroupState, StoredGroup, VersionRow


def stored(group_id: int, version: int = 0, tokens: int = 3) -> StoredGroup:
    spans = [VersionSpan(version, 0, tokens)]
    rows = [Response([group_id % 7] * tokens, [1] * tokens, float(k), spans) for k in range(2)]
    return StoredGroup(Group([5, 6], rows, group_id, group_id), [-0.5, 0.5])


def version(number: int, step: int) -> VersionRow:
    return VersionRow(number, step, 1, f"weights-{step}", f"/weights/{number}")


def new_ledger(path: Path) -> tuple[Journal, Ledger]:
    journal = Journal(path / "journal.sqlite", "run", "hash")
    return journal, Ledger(journal)


def crashed_copy(path: Path, to: Path) -> Path:
    """What the disk holds when the process dies now: the database and its write-ahead log."""
    to.mkdir(parents=True, exist_ok=True)
    for name in ("journal.sqlite", "journal.sqlite-wal"):
        if (path / name).exists():
            shutil.copy(path / name, to / name)
    return to


def leased_ledger(path: Path, steps: int) -> tuple[Journal, Ledger]:
    """A journal with ``steps`` leases of 2 groups, and one group more in flight."""
    journal, ledger = new_ledger(path)
    ledger.publish(version(0, 0))
    rule = LagRule(2, 100, 100)
    for step in range(steps):
        for group_id, _ in ledger.admit(2):
            ledger.finish_group(group_id, stored(group_id))
        assert ledger.form_lease(step, rule) is not None
    ledger.admit(1)
    return journal, ledger


def test_second_controller_is_refused(tmp_path: Path) -> None:
    journal, _ = new_ledger(tmp_path)
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    other = context.Process(target=_open_elsewhere, args=(tmp_path, found))
    other.start()
    message = found.get(timeout=300)  # starting a process takes long on a busy machine
    other.join()
    assert "in use by another controller (process" in message
    assert "set run.name to a new name" in message
    with pytest.raises(JournalError, match="in use by another controller"):
        Journal(tmp_path / "journal.sqlite", "run", "hash")
    journal.close()
    Journal(tmp_path / "journal.sqlite", "run", "hash").close()


def _open_elsewhere(path: Path, found: "multiprocessing.Queue[str]") -> None:
    try:
        Journal(path / "journal.sqlite", "run", "hash")
        found.put("opened")
    except JournalError as error:
        found.put(str(error))


def test_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.sqlite", "first try", "typo").close()  # nothing happened in it: it may change hands
    journal, ledger = new_ledger(tmp_path)
    ledger.admit(1)
    journal.close()
    with pytest.raises(JournalError, match=r"has data_hash 'hash', this run has 'other'.*run\.name"):
        Journal(tmp_path / "journal.sqlite", "run", "other")
    with pytest.raises(JournalError, match="has run_id 'run', this run has 'walk'"):
        Journal(tmp_path / "journal.sqlite", "walk", "hash")
    Journal(tmp_path / "journal.sqlite", "run", "hash").close()  # refusals gave the lock back


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(JournalError, match="is not a usable journal"):
        Journal(tmp_path / "journal.sqlite", "run", "hash")


def test_durability_levels(tmp_path: Path) -> None:
    """Lease, commit, attach and publish fsync; admissions and results need not."""
    journal, ledger = new_ledger(tmp_path)

    def level() -> int:
        return journal._db.execute("PRAGMA synchronous").fetchone()[0]

    ledger.publish(version(0, 0))
    assert level() == 2
    for group_id, _ in ledger.admit(2):
        ledger.finish_group(group_id, stored(group_id))
    assert level() == 1
    ledger.form_lease(0, LagRule(2, 0, 9))
    assert level() == 2
    ledger.admit(1)
    ledger.commit(1, 1)
    assert level() == 2
    assert journal._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    journal.close()


def test_attach_reopens_leases_unchanged(tmp_path: Path) -> None:
    journal, ledger = leased_ledger(tmp_path, steps=4)
    assert ledger.attach(0) == 1
    before = {step: list(groups) for step, groups in ledger.groups.leases.items()}
    ledger.commit(3, 1)
    assert ledger.attach(2) == 2
    assert ledger.groups.leases == {step: before[step] for step in (1, 2, 3)}, "step 0 is older than every checkpoint"
    states = {row.group_id: row.state for row in journal.rows()}
    assert [states[k] for k in range(9)] == ["committed"] * 4 + ["leased"] * 4 + ["in_flight"]
    assert ledger.payload(4) == stored(4)
    with pytest.raises(JournalError, match="holds no tokens of group 1"):
        ledger.payload(1)
    journal.close()


def test_resume_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    journal, ledger = leased_ledger(tmp_path, steps=3)
    with pytest.raises(JournalError, match=r"resumes at step 5, but .* knows 3 leases before it.*Restore it"):
        ledger.attach(5)
    ledger.commit(3, 2)
    with pytest.raises(JournalError, match="resumes at step 1, but the groups of step 1 were pruned"):
        ledger.attach(1)
    assert journal.incarnation == 0, "a refused trainer takes nothing over"
    assert ledger.attach(2) == 1
    journal.close()


def test_rows_stay_when_tokens_are_pruned(tmp_path: Path) -> None:
    journal, ledger = leased_ledger(tmp_path, steps=3)
    ledger.commit(2, 2)
    rows = list(journal.rows())
    assert [row.pruned for row in rows] == [True] * 4 + [False] * 2 + [True]
    assert [row.lease_step for row in rows] == [0, 0, 1, 1, 2, 2, None]
    assert [[response.advantage for response in row.responses] for row in rows[:6]] == [[]] * 4 + [[-0.5, 0.5]] * 2
    journal.close()


def test_a_commit_looks_at_nothing_that_is_long_committed(tmp_path: Path) -> None:
    """Of a history of any length it changes the newest groups, and finds them by an index."""
    journal, ledger = leased_ledger(tmp_path, steps=9)
    asked: list[str] = []
    journal._db.set_trace_callback(asked.append)
    ledger.commit(9, 8)
    journal._db.set_trace_callback(None)
    updates = [query for query in asked if query.startswith("UPDATE groups")]
    assert len(updates) == 2
    for query in updates:
        (plan,) = (row[3] for row in journal._db.execute(f"EXPLAIN QUERY PLAN {query}"))
        assert "USING INDEX groups_leased" in plan or "USING INDEX groups_with_tokens" in plan
    journal.close()


def test_an_earlier_commit_again_sets_nothing_back(tmp_path: Path) -> None:
    """A trainer repeats the one it resumed from, with no oldest step, to hear whether it was replaced."""
    journal, ledger = leased_ledger(tmp_path, steps=4)
    ledger.attach(0)
    ledger.commit(4, 3)
    ledger.commit(0, 0)
    assert (journal.committed_step, journal.oldest_step) == (4, 3)
    ledger.attach(3)
    assert journal.committed_step == 3, "a new trainer may resume from an earlier one"
    journal.close()


def test_version_numbers_are_never_given_twice(tmp_path: Path) -> None:
    journal, _ = new_ledger(tmp_path)
    assert [journal.allocate_version(), journal.allocate_version()] == [0, 1]
    journal.close()
    journal, _ = new_ledger(tmp_path)
    assert journal.allocate_version() == 2
    journal.close()


def test_evaluations_are_delivered_once_per_lease(tmp_path: Path) -> None:
    journal, _ = new_ledger(tmp_path)
    results = [Evaluation(step, step, 0.5 + step / 10, 8, 4.0, 0.1) for step in range(3)]
    assert journal.attach(0) == 1
    journal.record_evaluation(results[0], "a")
    assert journal.deliver_evaluations(1, 3) == results[:1]
    journal.record_evaluation(results[1], "b")
    assert journal.deliver_evaluations(1, 4) == results[1:2]
    assert journal.deliver_evaluations(1, 4) == results[1:2], "the reply was lost: the same again"
    assert journal.attach(0) == 2
    assert journal.deliver_evaluations(2, 0) == results[:1], "its lease is done again; weights 1 are yet to come"
    assert journal.reopen_evaluation(1, "b")
    assert not journal.reopen_evaluation(1, "other weights")
    assert journal.deliver_evaluations(2, 1) == results[1:2], "known weights are told again, not evaluated again"
    assert journal.reopen_evaluation(1, "b")
    assert journal.deliver_evaluations(2, 2) == [], "once a trainer"
    assert journal.has_evaluation(1, "b")
    assert not journal.has_evaluation(2, "c")
    journal.close()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_recovery_at_any_point_gives_the_state_in_memory(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """After every event the disk alone, opened anew, gives exactly what the controller holds in memory."""
    rng = random.Random(seed)
    home = tmp_path_factory.mktemp("journal")
    journal, ledger = new_ledger(home)
    rule = LagRule(2, 3, 50, rng.choice(["admission", "strict", "drop"]))
    ledger.publish(version(0, 0))
    attached = oldest = 0
    for event in range(25):
        groups = ledger.groups
        kind = rng.choice(["admit", "finish", "finish", "drop", "lease", "lease", "publish", "attach", "commit"])
        if kind == "admit":
            ledger.admit(rng.randint(1, 4))
        elif kind == "finish" and groups.in_flight:
            group_id = rng.choice(list(groups.in_flight))
            ledger.finish_group(group_id, stored(group_id, rng.choice(list(ledger.versions))))
        elif kind == "drop" and groups.in_flight:
            ledger.drop(rng.choice(list(groups.in_flight)), "reward failed")
        elif kind == "lease":
            ledger.form_lease(groups.next_step, rule)
        elif kind == "publish":
            ledger.publish(version(journal.allocate_version() + 1, groups.next_step))
        elif kind == "attach":
            attached = rng.randint(oldest, groups.next_step)
            ledger.attach(attached)
        elif kind == "commit":
            step = rng.randint(max(attached, oldest), groups.next_step)
            oldest = rng.randint(oldest, step)
            ledger.commit(step, oldest)
        if rng.random() < 0.3:
            copy, twin = new_ledger(crashed_copy(home, home / f"crash{event}"))
            assert twin.groups == ledger.groups
            assert twin.versions == ledger.versions
            assert copy.incarnation == journal.incarnation
            assert copy.next_version == journal.next_version
            for step, lease in twin.groups.leases.items():
                for group in lease:
                    assert twin.payload(group.group_id) == ledger.payload(group.group_id), step
            copy.close()
    live = ledger.groups.live
    states = [row.state for row in journal.rows()]
    assert live == sum(state is not GroupState.DROPPED for state in states)
    journal.close()


def test_recovery_by_hand() -> None:
    rows = [
        GroupRow(0, 0, GroupState.COMMITTED, None, 0, [], True),
        GroupRow(1, 1, GroupState.DROPPED, "lag", None, [], True),
        GroupRow(2, 2, GroupState.LEASED, None, 1, [], False),
        GroupRow(3, 3, GroupState.IN_FLIGHT, None, None, [], True),
        GroupRow(4, 4, GroupState.READY, None, None, [], False),
        GroupRow(5, 5, GroupState.IN_FLIGHT, None, None, [], True),
    ]
    groups = recover(rows, {4: 7, 5: 8})
    assert groups.in_flight == {3: 3, 5: 5}, "both are sampled again"
    assert list(groups.ready) == [4]
    assert {step: [group.group_id for group in lease] for step, lease in groups.leases.items()} == {1: [2]}
    assert (groups.live, groups.next_step, groups.next_id, groups.next_prompt) == (5, 2, 6, 6)
    assert [groups.position(k) for k in (0, 2, 5)] == [0, 1, 4], "the slot of the dropped group is free"
    with pytest.raises(JournalError, match="has group 3 where group 1 belongs"):
        recover([rows[0], rows[3]], {})


def test_describe(tmp_path: Path) -> None:
    journal, ledger = leased_ledger(tmp_path, steps=2)
    ledger.attach(1)
    ledger.drop(4, "reward of prompt 4 failed")
    text = describe_journal(tmp_path / "journal.sqlite")
    assert "groups: 2 committed, 1 dropped, 2 leased" in text
    assert "leases: 2, the last for step 1" in text
    assert "version 0: step 0, incarnation 1, checksum weights-0" in text
    assert "dropped group 4 (prompt 4): reward of prompt 4 failed" in text
    assert describe_journal(tmp_path) == text, "the directory of the journal will do"
    journal.close()
    with pytest.raises(JournalError, match="does not exist"):
        describe_journal(tmp_path / "nothing.sqlite")


def test_full_disk_is_named_and_nothing_of_the_change_stays(tmp_path: Path) -> None:
    """SQLite ends the transaction by itself then; the error of a second end must not hide the first."""
    journal, ledger = new_ledger(tmp_path)
    ledger.publish(version(0, 0))
    ledger.admit(2)
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(JournalError, match=r"journal\.sqlite could not be written: database or disk is full\. .*Free"):
        ledger.finish_group(0, stored(0, tokens=20_000))
    assert sorted(ledger.groups.in_flight) == [0, 1]
    journal._db.execute("PRAGMA max_page_count=1000000")
    ledger.finish_group(0, stored(0, tokens=20_000))
    assert [row.state for row in journal.rows()] == [GroupState.READY, GroupState.IN_FLIGHT]
    journal.close()
