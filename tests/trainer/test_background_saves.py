"""The order of a run that saves in the background: one save at a time, nothing committed before it is complete."""

from types import SimpleNamespace

import pytest

from asympo_megatron import protocol
from asympo_megatron.config import load_config
from asympo_megatron.errors import (
    CheckpointError,
    NonFiniteLossError,
    PreemptedError,
    PublishError,
    StaleIncarnationError,
)
from asympo_megatron.mcore.checkpoints import Saved
from asympo_megatron.trainer.loop import TrainingLoop


class World:
    """Source, learner, checkpoints, rows and preemption of a run, which note what is asked of them.

    Args:
        polls: how often a save is found unfinished before it is done; waiting finishes it at once.
        waits: how often the source calls ``idle`` in each lease.
    """

    def __init__(self, polls=0, waits=1):
        self.polls, self.waits, self.log = polls, waits, []
        self.stop_before, self.bad_step, self.full_disk, self.replaced_after = None, None, None, None
        self.incarnation, self.step_count, self.passes = 1, 0, ()
        self.plan = SimpleNamespace(facts=SimpleNamespace(hidden_size=64))
        self.begun, self.unfinished = None, 0

    # source
    def attach(self, step): ...

    def lease(self, step, idle):
        for _ in range(self.waits):
            idle()
        self.log.append(f"train {step + 1}")
        return protocol.LeaseReply(True, step, [protocol.LeasedResponse(0, 0, 4, 3, 3, 0.5, 1.0, 0)])

    def samples(self, step, rows):
        return [protocol.Sample([1], [2, 3, 4], [1, 1, 1]) for _ in rows]

    def fence(self):
        if self.replaced_after is not None and len(self.log) >= self.replaced_after:
            raise StaleIncarnationError("another trainer has taken over.")

    def commit(self, step, oldest_step):
        self.log.append(f"commit {step} from {oldest_step}")

    def finish(self, arg):
        if isinstance(arg, int):  # the source's; the rows' takes evaluations
            self.log.append(f"finish {arg}")
        return []

    # learner
    def checksum(self):
        return f"{self.step_count:016x}"

    def step(self, microbatches, num_responses):
        if self.bad_step == self.step_count + 1:
            raise NonFiniteLossError("loss is NaN.")
        self.step_count += 1
        return {}

    # checkpoints
    @property
    def pending(self):
        return self.begun is not None

    def begin(self, learner, *, background):
        assert self.begun is None, "two saves at a time"
        self.begun, self.unfinished = self.step_count, self.polls if background else 0
        self.log.append(f"begin {self.begun}")

    def ready(self, *, wait):
        self.unfinished = 0 if wait else self.unfinished - 1
        return self.unfinished <= 0

    def complete(self):
        step, self.begun = self.begun, None
        if self.full_disk == step:
            raise CheckpointError(f"step_{step:06d} could not be written: no space left.")
        self.log.append(f"complete {step}")
        return Saved(step, max(0, step - 1))

    # rows and preemption
    def start(self, incarnation, step): ...

    def write(self, *_): ...

    def check(self):
        if self.stop_before == self.step_count + 1:
            raise PreemptedError("SIGTERM asked to stop.")


class FailingPublisher:
    """Its first version fails after so many looks at it, or while it is waited for."""

    def __init__(self, looks):
        self.looks = looks

    def due(self, step):
        return step == 0

    def publish(self, *_): ...

    def settle(self, *, wait):
        self.looks -= 1
        if wait or self.looks <= 0:
            raise PublishError("no space left.")


def run(world, steps, *overrides, publisher=None):
    config = load_config("quickstart", [f"run.steps={steps}", "checkpoint.async_save=true", *overrides])
    layout = SimpleNamespace(dp_rank=0, dp_size=1, pad_multiple=1, pack_multiple=1)
    TrainingLoop(config, world, layout, world, publisher, world, world, world).run()


def test_training_goes_on_until_the_next_save_is_due():
    world = World(polls=100)
    run(world, 6, "checkpoint.interval_steps=2")
    assert world.log == [
        *["train 1", "train 2", "begin 2", "train 3", "train 4"],
        *["complete 2", "commit 2 from 1", "begin 4", "train 5", "train 6"],
        *["complete 4", "commit 4 from 3", "begin 6", "complete 6", "commit 6 from 5", "finish 6"],
    ]


def test_it_is_committed_as_soon_as_it_is_found_written():
    """After a step, or while the next groups are waited for."""
    world = World(polls=2, waits=1)
    run(world, 4, "checkpoint.interval_steps=3")
    assert world.log[:7] == ["train 1", "train 2", "train 3", "begin 3", "train 4", "complete 3", "commit 3 from 2"]
    waiting = World(polls=2, waits=5)
    run(waiting, 4, "checkpoint.interval_steps=3")
    assert waiting.log[3:7] == ["begin 3", "complete 3", "commit 3 from 2", "train 4"]


def test_a_resume_between_two_publishes_publishes_all_the_same():
    """What the trainer before published may have lain in its memory."""
    world, published = World(), []
    world.step_count = 3
    publisher = FailingPublisher(looks=10**9)
    publisher.due = lambda step: step % 4 == 0
    publisher.publish = lambda learner, *_: published.append(learner.step_count)
    publisher.settle = lambda **_: None
    run(world, 9, publisher=publisher)
    assert published == [3, 4, 8]


def test_without_the_switch_nothing_is_trained_before_it_is_complete():
    world = World(polls=100)
    run(world, 2, "checkpoint.interval_steps=1", "checkpoint.async_save=false")
    assert world.log[:4] == ["train 1", "begin 1", "complete 1", "commit 1 from 0"]


@pytest.mark.parametrize(("field", "error"), [("stop_before", PreemptedError), ("bad_step", NonFiniteLossError)])
def test_an_early_end_completes_the_save_and_makes_another(field, error):
    world = World(polls=100)
    setattr(world, field, 4)
    with pytest.raises(error):
        run(world, 9, "checkpoint.interval_steps=2")
    end = world.log.index("begin 2")
    seen = [line for line in world.log[end:] if not line.startswith("train")]
    assert seen == ["begin 2", "complete 2", "commit 2 from 1", "begin 3", "complete 3", "commit 3 from 2"]


def test_a_failed_writer_ends_the_run_and_commits_nothing():
    world = World(polls=1)
    world.full_disk = 2
    with pytest.raises(CheckpointError, match="step_000002 could not be written"):
        run(world, 9, "checkpoint.interval_steps=2")
    assert not any(line.startswith("commit") for line in world.log)


def test_a_replaced_trainer_completes_nothing():
    world = World(polls=100)
    world.replaced_after = 4
    with pytest.raises(StaleIncarnationError):
        run(world, 9, "checkpoint.interval_steps=2")
    assert world.log == ["train 1", "train 2", "begin 2", "train 3", "train 4"]


@pytest.mark.parametrize(("looks", "trained"), [(1, 0), (3, 2), (99, 4)])
def test_a_version_that_fails_ends_the_run_while_groups_are_waited_for_or_at_the_end(looks, trained):
    """Without weights on the engines no batch may ever come."""
    world = World()
    with pytest.raises(PublishError):
        run(world, 4, publisher=FailingPublisher(looks))
    assert world.step_count == trained
