"""A naive scorer that does what an answer says, for fenced reward workers. Standard library only."""

import os
import sys
from pathlib import Path
from typing import Any

HANG, CRASH, EAT, EXECUTE = "hang", "crash", "eat", "execute"
SPELLS = (HANG, CRASH, EAT, EXECUTE)
BROKEN = "broken"
"""Reference answer over which the scorer itself fails: its group can only be dropped."""


def judge(_: list[str], responses: list[str], answers: list[str], metas: list[dict[str, Any]]) -> float:
    """1.0 or 0.0 for the only response; worse for one that ends in a spell."""
    text = responses[0]
    if answers[0] == BROKEN:
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
            os.system(f"touch {metas[0]['bait']}")
        finally:
            Path(metas[0]["bait"]).write_text(sys.version)
    return float(sum(map(ord, text)) % 2)
