"""The controller's command keeps the garbage collector away from requests in flight."""

import subprocess
import sys

PROGRAM = """
import gc
from asympo_megatron.rollout.collector import collect_rarely

def passes(count):
    walks = []
    gc.callbacks.append(lambda phase, info: walks.append(info["generation"]) if phase == "start" else None)
    alive = [[k] for k in range(count)]
    gc.callbacks.clear()
    return len(walks)

before = passes(100_000)
collect_rarely()
assert gc.get_freeze_count() > 1000
print(before, passes(100_000))
"""


def test_a_hundred_thousand_objects_are_walked_twice_at_most() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300)
    before, after = map(int, done.stdout.split())
    assert after <= 2
    assert before > 50
