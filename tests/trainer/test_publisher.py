"""The learner goes on while a version is brought to the engines, and no tensor is read after it has changed."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from asympo_megatron.config import Config
from asympo_megatron.errors import PublishError, StaleIncarnationError
from asympo_megatron.protocol import PublishReply, PublishRequest, VersionReply, VersionRequest
from asympo_megatron.sync.manifest import version_path
from asympo_megatron.sync.transport import DiskTransport
from asympo_megatron.trainer import publisher as module
from asympo_megatron.trainer.exchange import Exchange
from asympo_megatron.trainer.handover import Handover
from asympo_megatron.trainer.publisher import Publisher

LIMIT_S = 60


class Controller:
    """Gives out versions and notes what is announced, after ``before`` has returned."""

    def __init__(self) -> None:
        self.announced: list[PublishRequest] = []
        self.before: Callable[[], object] = lambda: None

    def version(self, request: VersionRequest) -> VersionReply:
        return VersionReply(request.step, True)

    def publish(self, request: PublishRequest) -> PublishReply:
        self.before()
        self.announced.append(request)
        return PublishReply([])


class Learner:
    """Weights of one value, which training changes in place."""

    def __init__(self, count: int = 3, size: int = 4) -> None:
        self.step_count = 0
        self.weights = [torch.zeros(size) for _ in range(count)]

    def step(self) -> None:
        self.step_count += 1
        for weight in self.weights:
            weight += 1

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, weight in enumerate(self.weights):
            yield f"w{number}", weight


class World:
    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, learner: Learner | None = None) -> None:
        model = root / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        self.root, self.learner, self.controller = root / "weights", learner or Learner(), Controller()
        monkeypatch.setattr(module, "export_hf", lambda learner: learner.export())
        controller: Any = self.controller
        self.transport = DiskTransport(self.root, model, keep_last=9)
        self.publisher = Publisher(Config(), controller, Exchange(0, 1, 0), self.transport)

    def publish(self) -> None:
        learner: Any = self.learner
        self.publisher.publish(learner, 1, f"weights-{self.learner.step_count}")

    def values(self, version: int) -> set[float]:
        """The distinct values in a published version."""
        tensors = load_file(version_path(self.root, version) / "model.safetensors").values()
        return {value for tensor in tensors for value in tensor.tolist()}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.publisher.close()


@pytest.mark.parametrize("size", [4, 3 << 20], ids=["held until the file ends", "written at once"])
def test_training_on_changes_nothing_of_what_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    world = World(tmp_path, monkeypatch, Learner(size=size))
    go, write = threading.Event(), DiskTransport.store

    def store(transport: DiskTransport, version: int, step: int, tensors: Any, checksum: str) -> str:
        def slowly() -> Iterator[tuple[str, torch.Tensor]]:
            yield from tensors
            assert go.wait(LIMIT_S)  # every tensor is taken, the file is not complete

        return write(transport, version, step, slowly(), checksum)

    monkeypatch.setattr(DiskTransport, "store", store)
    world.publish()
    assert not version_path(world.root, 0).exists(), "the learner waited for the disk"
    world.learner.step()
    go.set()
    world.publisher.settle(wait=True)
    assert world.values(0) == {0.0}
    world.publisher.close()


def test_versions_come_one_after_the_other(world: World) -> None:
    world.publish()
    order: list[str] = []
    go = threading.Event()
    world.publisher.settle(wait=True)
    world.controller.before = lambda: (go.wait(LIMIT_S), order.append("announced"))
    world.learner.step()
    world.publish()
    world.publisher.settle(wait=False)  # nothing has failed: no wait
    assert len(world.controller.announced) == 1
    threading.Thread(target=lambda: (order.append("released"), go.set())).start()
    world.learner.step()
    world.publish()
    assert order[:2] == ["released", "announced"]
    world.publisher.settle(wait=True)
    assert [request.step for request in world.controller.announced] == [0, 1, 2]
    assert [world.values(version) for version in range(3)] == [{0.0}, {1.0}, {2.0}]
    assert world.controller.announced[2].path == str(version_path(world.root, 2).resolve())


def test_mutant_that_does_not_wait_publishes_other_weights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors given away at once, by reference: what is written is the next step's."""
    go, write = threading.Event(), DiskTransport.store

    def late(*arguments: Any) -> str:
        assert go.wait(LIMIT_S)
        return write(*arguments)

    def give(self: Handover, tensors: Any) -> None:
        for item in (*tensors, None):
            self._items.put(item)
        self._thread.start()

    monkeypatch.setattr(DiskTransport, "store", late)
    monkeypatch.setattr(Handover, "give", give)
    world.publish()
    world.learner.step()
    go.set()
    world.publisher.settle(wait=True)
    assert world.values(0) == {1.0}


def test_a_failure_that_comes_while_it_is_looked_for_is_not_lost() -> None:
    class Failing(Handover):
        """The thread ends between two looks at what it did."""

        error: BaseException | None = None

        @property
        def _problem(self) -> BaseException | None:  # type: ignore[override]
            seen, self.error, self._over = self.error, StaleIncarnationError("late"), True
            return seen

        @_problem.setter
        def _problem(self, value: BaseException | None) -> None:
            self.error = value

    handover = Failing(lambda _: None)
    assert not handover.finish(wait=False)
    with pytest.raises(StaleIncarnationError, match="late"):
        handover.finish(wait=False)


def test_a_failure_is_raised_by_the_next_call(world: World) -> None:
    def refuse() -> None:
        raise StaleIncarnationError("another trainer has attached")

    world.controller.before = refuse
    world.publish()
    with pytest.raises(StaleIncarnationError, match="another trainer has attached"):
        world.publisher.settle(wait=True)


def test_a_disk_that_is_full_from_the_start_is_told_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise PublishError("no space left")

    monkeypatch.setattr(DiskTransport, "store", full)
    with pytest.raises(PublishError, match="no space left"):
        world.publish()


def test_a_version_that_lies_there_already_takes_no_tensor(world: World) -> None:
    """A publish whose answer was lost is done again: the directory is there, whole."""
    learner: Any = world.learner
    world.transport.store(0, 0, learner.export(), "weights-0")
    world.publish()
    world.publisher.settle(wait=True)
    assert [request.version for request in world.controller.announced] == [0]


def test_a_gather_that_fails_leaves_nothing_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(learner: Learner) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w0", learner.weights[0]
        raise RuntimeError("a rank is gone")

    monkeypatch.setattr(module, "export_hf", broken)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        world.publish()
    world.publisher.close()
    assert list(world.root.iterdir()) == []
    assert world.controller.announced == []
