"""benchmarks/chaos.py: its verdict by hand, its plan, one short campaign, and a mutant that the verdict must notice."""

from collections import Counter

import chaos
import chaos_megatron
import pytest
from chaos_plan import Fault, all_faults, check_points, draw
from chaos_verdict import Verdict, judge_committed, judge_groups, judge_rows, judge_steps, judge_versions
from chaos_world import matches, prompt_ids, prompt_index, response_ids

from asympo_megatron.metrics import MetricsWriter

GROUPS = [
    (0, 0, "committed", None, 0),
    (1, 1, "committed", None, 1),
    (2, 2, "dropped", "reward of prompt 2 failed: why", None),
    (3, 3, "committed", None, 0),
    (4, 4, "committed", None, 1),
]
TRAINED = [[0, 3], [1, 4]]


def judged(groups=GROUPS, trained=TRAINED):
    verdict = Verdict()
    judge_groups(verdict, groups, trained)
    return verdict


def changed(group, **fields):
    names = ("group_id", "prompt_index", "state", "reason", "lease_step")
    row = tuple(fields.get(name, value) for name, value in zip(names, GROUPS[group], strict=True))
    return [*GROUPS[:group], row, *GROUPS[group + 1 :]]


def test_every_group_trained_once_or_dropped_with_a_reason():
    verdict = judged()
    assert verdict.problems == []
    assert (verdict.groups, verdict.trained, verdict.dropped) == (5, 4, Counter({"reward of prompt  failed": 1}))


@pytest.mark.parametrize(
    ("groups", "trained", "message"),
    [
        (GROUPS, [[0, 3], [1]], "group 4 of step 1 is committed and trained 0 times"),
        (changed(4, state="in_flight", lease_step=None), [[0, 3], [1]], "group 4 of step None is in_flight"),
        (changed(2, reason=None), TRAINED, "group 2 dropped without a reason"),
        ([row for row in GROUPS if row[0] != 3], TRAINED, "prompt 3 in no group"),
        (GROUPS, [[0, 3], [1, 4, 9]], "prompt 9 trained, but not in the journal"),
    ],
)
def test_lost(groups, trained, message):
    verdict = judged(groups, trained)
    assert any(message in problem for problem in verdict.lost), verdict
    assert verdict.duplicated == []


@pytest.mark.parametrize(
    ("groups", "trained", "message"),
    [
        (GROUPS, [[0, 3], [1, 4, 3]], "prompt 3 trained 2 times"),
        (GROUPS, [[0, 3], [1, 4, 2]], "group 2 trained, though dropped"),
        (changed(4, lease_step=0), TRAINED, "group 4 leased for step 0, trained in 1"),
        ([*GROUPS, (5, 3, "dropped", "why", None)], TRAINED, "prompt 3 in 2 groups"),
    ],
)
def test_duplicated(groups, trained, message):
    assert any(message in problem for problem in judged(groups, trained).duplicated)


def test_committed_without_a_checkpoint_is_lost():
    verdict = Verdict()
    judge_committed(verdict, changed(4, state="leased"), [[0, 3]])
    assert verdict.lost == ["group 1 of step 1 is committed, but in no checkpoint"]


def test_weights_of_a_trainer_that_was_replaced():
    versions = [(0, 0, 1, "a"), (1, 1, 2, "b"), (2, 1, 1, "c")]
    loads = [
        {"event": "loaded", "role": "engine0", "version": 1, "checksum": "b"},
        {"event": "loaded", "role": "engine1", "version": 2, "checksum": "x"},
    ]
    verdict = Verdict()
    judge_versions(verdict, versions, loads)
    assert verdict.duplicated == ["version 2 published by trainer 1 after 2 had"]
    assert verdict.corrupt == ["engine1 loaded other weights as version 2"]


def test_steps_done_again(tmp_path):
    events = [{"event": "trained", "step": step, "checksum": sum_} for step, sum_ in [(1, "a"), (2, "b"), (2, "b")]]
    verdict = Verdict()
    judge_steps(verdict, events)
    assert (verdict.redone, verdict.problems) == (1, [])
    judge_steps(verdict, [*events, {"event": "trained", "step": 1, "checksum": "c"}])
    assert verdict.redone_differently == ["step 1 ended at 2 different weights"]

    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in (0, 2):
        writer.write({"step": step, "train/weights_checksum": "b"})
    writer.close()
    verdict = Verdict()
    judge_rows(verdict, tmp_path, 2, "b")
    assert verdict.redone_differently == ["metrics have no row of steps [1]"]


def test_plan_brings_every_fault_before_any_comes_twice():
    check_points()
    kinds = Counter((fault.role.rstrip("01"), fault.phase, fault.point, fault.kind) for fault in draw(200, seed=3))
    assert len(kinds) == len(all_faults()) == len(set(all_faults()))
    assert set(kinds.values()) == {1, 2}
    assert draw(200, seed=3) == draw(200, seed=3) != draw(200, seed=4)


def test_faults_on_the_real_trainer_are_at_points_it_has():
    assert all(callable(getattr(owner, name)) for owner, name, _ in chaos_megatron.PIERCED)
    reached = {f"{point}:{when}" for _, _, point in chaos_megatron.PIERCED for when in ("before", "after")}
    assert len(chaos_megatron.FAULTS) == 10
    assert {fault.point for fault in chaos_megatron.FAULTS if fault.role == "trainer"} <= reached


def test_a_response_tells_whose_it_is():
    assert prompt_index(prompt_ids(100_000)) == 100_000
    assert matches(response_ids(7, 1), 7, 1)
    assert matches([*response_ids(7, 1)[:-1], 57], 7, 1), "a spell in place of the last token"
    assert not matches(response_ids(7, 1), 8, 1)
    assert not matches(response_ids(7, 1)[:-1], 7, 1)


@pytest.fixture(scope="module")
def context():
    return chaos.process_context()


def test_a_short_campaign_loses_nothing(tmp_path, context):
    faults = [
        Fault("controller", "lease", "lease:after", "kill"),
        Fault("engine0", "mid-sync", "load:after", "kill"),
        Fault("trainer", "checkpoint", "save:marked", "kill"),
    ]
    conductor = chaos.small_campaign(context, tmp_path / "home", faults, variety=0)
    assert conductor.verdict.problems == []
    assert sum(conductor.hits.values()) == 3
    assert conductor.missed == []
    assert conductor.verdict.redone >= 1, "no step was done again, so the test saw nothing"
    assert conductor.verdict.trained == 2 * (6 * len(faults) + 10)


def test_a_commit_before_its_checkpoint_is_noticed(tmp_path, context, monkeypatch):
    monkeypatch.setattr(chaos, "MUTANT_HANG_S", 3.0)
    conductor = chaos.small_campaign(
        context, tmp_path / "home", [chaos.MUTANTS["early_commit"]], variety=0, mutant="early_commit"
    )
    assert any("is committed, but in no checkpoint" in problem for problem in conductor.verdict.lost)
