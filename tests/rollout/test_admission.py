"""The lag rule: hand values, and random histories with crashes of the trainer, drops and stragglers."""

import bisect
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asympo_megatron.rollout.admission import NO_LAG, LagRule, lag_of


class Stuck(Exception):
    """Nothing can happen any more, but the run is not over."""


@dataclass
class History:
    """A run reduced to its order of events. ``live`` can be overruled by a mutant."""

    rule: LagRule
    rng: random.Random
    interval: int = 1
    in_order: bool = False
    crashes: int = 0
    drops: int = 0
    next_id: int = 0
    step: int = 0
    installed: int = 0
    checkpoint: int = 0
    in_flight: dict[int, int | None] = field(default_factory=dict)
    ready: dict[int, int] = field(default_factory=dict)
    leases: dict[int, tuple[int, ...]] = field(default_factory=dict)
    sampled: dict[int, int] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)

    def live(self) -> int:
        return self.next_id - len(self.dropped)

    def may_sample(self, group: int) -> bool:
        return self.rule.may_sample(self.installed, group - bisect.bisect_left(self.dropped, group))

    def run(self) -> "History":
        while self.step < self.rule.total_steps:
            events = [
                event for event in (self._admit, self._work, self._lose, self._lease, self._crash) if event(False)
            ]
            if not events:
                raise Stuck(f"step {self.step}, installed {self.installed}, live {self.live()}, {self.in_flight}")
            self.rng.choice(events)(True)
        return self

    def _admit(self, do: bool) -> bool:
        slots = self.rule.slots(self.installed, self.live())
        if do:
            for _ in range(self.rng.randint(1, slots)):
                self.in_flight[self.next_id] = None
                self.next_id += 1
        return slots > 0

    def _work(self, do: bool) -> bool:
        able = [group for group in self.in_flight if self.may_sample(group)]
        if self.in_order:
            able = able[:1]
        if do and able:
            group = self.rng.choice(able)
            before = self.in_flight[group]
            self.in_flight[group] = self.installed if before is None else min(before, self.installed)
            if self.rng.random() < 0.6:
                self.ready[group] = self.sampled[group] = self.in_flight.pop(group)
        return bool(able)

    def _lose(self, do: bool) -> bool:
        """A reward fails for good: the group is dropped."""
        able = bool(self.in_flight) and self.drops > 0
        if do and able:
            self.drops -= 1
            group = self.rng.choice(list(self.in_flight))
            del self.in_flight[group]
            bisect.insort(self.dropped, group)
        return able

    def _lease(self, do: bool) -> bool:
        if self.step not in self.leases:
            selection = self.rule.select(self.step, self.in_flight.keys(), self.ready)
            for group in selection.dropped:
                del self.ready[group]
                bisect.insort(self.dropped, group)
            if selection.group_ids is None:
                return bool(selection.dropped)
            self.leases[self.step] = selection.group_ids
            for group in selection.group_ids:
                del self.ready[group]
        if do:
            self.lags += [lag_of(self.step, self.sampled[group]) for group in self.leases[self.step]]
            self.step += 1
            if self.step % self.interval == 0:
                self.installed = self.step
            if self.rng.random() < 0.3:
                self.checkpoint = self.step - self.step % self.interval
        return True

    def _crash(self, do: bool) -> bool:
        """The trainer dies and resumes from its checkpoint; its weights go back to the engines."""
        able = self.crashes > 0 and self.step > self.checkpoint
        if do:
            self.crashes -= 1
            self.step = self.installed = self.checkpoint
        return able


seeds = st.integers(0, 2**32)


def history(seed: int, policy: str, lag: int, cls: type[History] = History, **more) -> History:
    rng = random.Random(seed)
    rule = LagRule(rng.randint(1, 3), lag, rng.randint(1, 8), policy)
    return cls(rule, rng, **more)


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(0, 3), st.sampled_from(["admission", "strict", "drop"]))
def test_runs_end_and_train_every_group_once(seed: int, lag: int, policy: str) -> None:
    interval = 1 + seed % (lag + 1)
    done = history(seed, policy, lag, interval=interval, crashes=3, drops=5).run()
    trained = [group for step in range(done.rule.total_steps) for group in done.leases[step]]
    assert len(trained) == len(set(trained)) == done.rule.groups_per_step * done.rule.total_steps
    assert sorted([*trained, *done.dropped]) == list(range(done.next_id)), "a group is neither trained nor dropped"


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(0, 3), st.sampled_from(["strict", "drop"]))
def test_strict_and_drop_never_exceed_the_bound(seed: int, lag: int, policy: str) -> None:
    interval = 1 + seed % (lag + 1)
    done = history(seed, policy, lag, interval=interval, crashes=3, drops=5).run()
    assert max(done.lags) <= lag


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(0, 3))
def test_admission_holds_the_bound_when_groups_end_in_order(seed: int, lag: int) -> None:
    done = history(seed, "admission", lag, in_order=True, crashes=3, drops=5).run()
    assert max(done.lags) <= lag


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_lag_zero_is_synchronous(seed: int) -> None:
    done = history(seed, "admission", 0, crashes=3, drops=5).run()
    assert set(done.lags) == {0}
    trained = [group for step in range(done.rule.total_steps) for group in done.leases[step]]
    assert trained == sorted(trained)


# -- mutants: each must be caught by what the properties above assert


class DroppedKeepsItsSlot(History):
    def live(self) -> int:
        return self.next_id


class NotAskedAgain(History):
    """The rule is asked at admission only, not before every request: wrong after a resume."""

    def may_sample(self, group: int) -> bool:
        return True


@dataclass(frozen=True)
class OneTooMany(LagRule):
    def capacity(self, step: int) -> int:
        return super().capacity(step) + 1


def test_mutant_dropped_groups_keep_their_slot() -> None:
    runs = [history(seed, "admission", 0, DroppedKeepsItsSlot, drops=5) for seed in range(20)]
    with pytest.raises(Stuck):
        [run.run() for run in runs]


def test_mutant_gate_only_at_admission() -> None:
    worst = [max(history(seed, "strict", 1, NotAskedAgain, crashes=3).run().lags) for seed in range(60)]
    assert max(worst) > 1


def test_mutant_capacity_off_by_one() -> None:
    worst = []
    for seed in range(30):
        run = history(seed, "strict", 0)
        rule = OneTooMany(run.rule.groups_per_step, 0, run.rule.total_steps + 1, "strict")
        done = replace(run, rule=rule)
        try:
            worst.append(max(done.run().lags))
        except Stuck:
            worst.append(0)
    assert max(worst) > 0


# -- hand values


def test_capacity_by_hand() -> None:
    rule = LagRule(groups_per_step=32, max_lag_steps=4, total_steps=250)
    assert rule.slots(step=0, live=0) == 160
    assert rule.slots(step=0, live=160) == 0
    assert rule.slots(step=1, live=160) == 32
    assert rule.slots(step=248, live=7990) == 10, "no prompt starts that would never be trained"
    assert rule.may_sample(step=0, position=159)
    assert not rule.may_sample(step=0, position=160)
    assert rule.slots(step=0, live=190) == 0, "after a resume live may exceed the capacity"


def test_selection_by_hand() -> None:
    ready = {3: 5, 4: 7, 6: 8, 9: NO_LAG}
    rule = LagRule(2, 1, 100, "admission")
    assert rule.select(8, {2, 5}, ready).group_ids == (3, 4)
    assert rule.select(8, {2}, {3: 5}).group_ids is None
    strict = LagRule(2, 1, 100, "strict")
    assert strict.select(8, {2, 5}, ready).group_ids is None, "group 2 is older and not done"
    assert strict.select(8, {5}, ready).group_ids == (3, 4)
    drop = LagRule(2, 1, 100, "drop").select(8, {2}, ready)
    assert drop.group_ids == (4, 6)
    assert dict(drop.dropped) == {3: "lag 3 above max_lag_steps 1 at step 8"}


def test_lag_is_clipped() -> None:
    assert [lag_of(5, 3), lag_of(5, 5), lag_of(5, 8), lag_of(5, NO_LAG)] == [2, 0, 0, 0]
