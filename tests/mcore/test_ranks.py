"""What happens when ranks disagree: empty micro-batches, refusals, failures and time-outs."""

from pathlib import Path
from typing import Any

import pytest
from rank_programs import HUNG, PROGRAM

from asympo_megatron.testing.megatron import RankError, run_ranks


@pytest.mark.slow
def test_rank_without_trained_token_takes_part() -> None:
    got = run_ranks(f"{PROGRAM}:anchor", 2, {"mutant": False}, timeout_s=200)
    assert got[0] == got[1]
    assert got[0]["tokens"] == 1.0
    assert got[0]["grad_norm"] > 0


@pytest.mark.slow
def test_without_the_anchor_the_ranks_wait_for_ever() -> None:
    with pytest.raises(RankError, match=f"ended with code {HUNG}"):
        run_ranks(f"{PROGRAM}:anchor", 2, {"mutant": True, "patience_s": 20.0}, timeout_s=300)


@pytest.mark.slow
def test_one_ranks_bad_rows_are_every_ranks_error() -> None:
    got = run_ranks(f"{PROGRAM}:refusals", 2, timeout_s=300)
    assert got[0]["rows"] == "BatchError: rank 1 refused its rows; its log has the reason."
    assert got[1]["rows"].startswith("BatchError: response 0 holds token id 67")
    assert got[0]["loss"] == got[1]["loss"]
    assert got[0]["loss"].startswith("NonFiniteLossError: step 0")
    for rank in got:
        assert rank["checksum"] == rank["checksum_before"]


def test_failing_programs_are_reported(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "def fail(payload):\n    raise ValueError(payload['text'])\ndef echo(payload):\n    return payload\n"
    )
    payload: dict[str, Any] = {"text": "sour grapes"}
    with pytest.raises(RankError, match=r"(?s)rank 0 ended with code 1.*ValueError: sour grapes"):
        run_ranks(f"{program}:fail", 1, payload)
    assert run_ranks(f"{program}:echo", 1, payload) == [payload]


@pytest.mark.slow
def test_hanging_programs_say_where(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import threading\ndef hang(payload):\n    threading.Event().wait()\n")
    with pytest.raises(RankError, match=r"(?s)time-out after 20 s.*in hang"):
        run_ranks(f"{program}:hang", 1, timeout_s=20)
