"""Tensors made in a thread while others are written: order, distance, and what happens when either side fails."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from asympo_megatron.conversion import tensors
from asympo_megatron.conversion.tensors import AHEAD, made_ahead


class Maker:
    """Makes tensors that can be counted, the one of number ``held`` when it is told, the one of ``failing`` never."""

    def __init__(self, held=None, failing=None):
        self.asked, self.held, self.failing = [], held, failing
        self.holding, self.go_on = threading.Event(), threading.Event()

    def __call__(self, number):
        self.asked.append(number)
        if number == self.failing:
            raise OSError("disk gone")
        if number == self.held:
            self.holding.set()
            assert self.go_on.wait(60)
        return torch.tensor(number)


def test_all_come_in_order():
    assert [int(made) for made in made_ahead(Maker(), 11)] == list(range(11))
    assert list(made_ahead(Maker(), 0)) == []


def test_at_most_so_many_are_made_ahead():
    maker = Maker()
    made = made_ahead(maker, 100)
    for taken in range(1, 20):
        next(made)
        assert max(maker.asked) < taken + AHEAD
    made.close()


def test_a_failure_comes_in_its_turn():
    made = made_ahead(Maker(failing=3), 11)
    assert [int(next(made)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(made)


def test_for_a_caller_that_gives_up_nothing_more_is_begun(monkeypatch):
    maker = Maker(held=1)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            maker.go_on.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr(tensors, "ThreadPoolExecutor", Pool)
    made = made_ahead(maker, 100)
    next(made)
    assert maker.holding.wait(60)
    made.close()
    assert maker.asked == [0, 1]
