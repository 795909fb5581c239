"""One timer for many time-outs, on a virtual clock."""

import asyncio

import pytest

from asympo_megatron.rollout.expiry import Expiring, Expiry
from asympo_megatron.testing.virtual_time import run_virtual


class Calls:
    """What expired, and when."""

    def __init__(self, timeout_s):
        self.expiry, self.seen = Expiry(timeout_s), []

    def add(self, name, after=lambda: None):
        entry = Entry(self, name, after)
        self.expiry.add(entry)
        return entry


class Entry(Expiring):
    def __init__(self, calls, name, after):
        self._calls, self._name, self._after = calls, name, after

    def expire(self):
        self._calls.seen.append((self._name, asyncio.get_running_loop().time()))
        self._after()


def test_each_entry_expires_at_its_own_time_unless_removed():
    async def scenario():
        calls, entries = Calls(10.0), {}
        for name in "abcd":  # at 0, 1, 2, 3
            entries[name] = calls.add(name)
            await asyncio.sleep(1)
        calls.expiry.remove(entries["a"])  # the one that the timer was set for
        calls.expiry.remove(entries["c"])
        await asyncio.sleep(100)
        calls.expiry.remove(entries["b"])  # done after all, too late
        return calls.seen

    assert run_virtual(scenario()) == [("b", pytest.approx(11.0)), ("d", pytest.approx(13.0))]


def test_it_serves_again_after_a_quiet_time():
    async def scenario():
        calls = Calls(10.0)
        calls.expiry.remove(calls.add("a"))
        await asyncio.sleep(500)
        calls.add("b")
        await asyncio.sleep(500)
        return calls.seen

    assert run_virtual(scenario()) == [("b", pytest.approx(510.0))]


def test_entries_added_by_an_expiry_wait_their_time():
    async def scenario():
        calls = Calls(10.0)
        calls.add("a", after=lambda: calls.add("again"))
        calls.add("b")
        await asyncio.sleep(100)
        return calls.seen

    assert run_virtual(scenario()) == [
        ("a", pytest.approx(10.0)),
        ("b", pytest.approx(10.0)),
        ("again", pytest.approx(20.0)),
    ]


def test_the_oldest_expire_before_their_time_some_at_a_time():
    async def scenario():
        calls = Calls(10.0)
        for name in "abc":
            calls.add(name)
        begun_s = asyncio.get_running_loop().time()
        found = [calls.expiry.expire_oldest(2, begun_s)]
        await asyncio.sleep(1)
        calls.add("later")
        found += [calls.expiry.expire_oldest(2, begun_s), calls.expiry.expire_oldest(2, begun_s)]
        assert found == [True, True, False]
        await asyncio.sleep(100)
        return calls.seen

    assert run_virtual(scenario()) == [("a", 0.0), ("b", 0.0), ("c", 1.0), ("later", pytest.approx(11.0))]


def test_nothing_happens_after_close():
    async def scenario():
        calls = Calls(10.0)
        calls.add("a")
        calls.expiry.close()
        await asyncio.sleep(100)
        return calls.seen

    assert run_virtual(scenario()) == []
