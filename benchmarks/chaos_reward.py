"""A naive scorer that does what an answer says, for fenced reward workers. Standard library only."""

import os
import sys
from pathlib import Path

HANG, CRASH, EAT, EXECUTE = "hang", "crash", "eat", "execute"
SPELLS = (HANG, CRASH, EAT, EXECUTE)
BROKEN = "broken"
"""Reference answer over which the scorer itself fails: its group can only be dropped."""


def judge(text: str, answer: str, bait: str) -> float:
    """1.0 or 0.0 for a response; worse for one that ends in a spell. ``bait``: a file that nothing may write."""
    if answer == BROKEN:
        raise ValueError("this prompt has no usable reference answer")
    if text.endswith(HANG):
        while True:
            pass
    if text.endswith(CRASH):
        os._exit(3)
    if text.endswith(EAT):
        eaten = []
        while True:
            eaten.append(bytearray(64 << 20))
    if text.endswith(EXECUTE):
        try:
            os.system(f"touch {bait}")
        finally:
            Path(bait).write_text(sys.version)
    return float(sum(map(ord, text)) % 2)
