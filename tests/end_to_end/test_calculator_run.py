"""The calculator example: its arithmetic, and `asympo run` on it from the files it writes to what the journal holds."""

import importlib.util
import itertools
import sqlite3
import subprocess
import sys
from pathlib import Path

import command_bench
import msgspec
import pytest

from asympo_megatron.config import RunDir, load_config
from asympo_megatron.records import check_group, read_groups
from asympo_megatron.rollout.rows import StoredGroup
from asympo_megatron.tasks import Codec

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = EXAMPLES / "configs" / "calculator_cpu.yaml"
STEPS = 3


@pytest.fixture(scope="module")
def calculator():
    spec = importlib.util.spec_from_file_location("calculator", EXAMPLES / "calculator.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "value"),
    [("13*4", 52), ("52+57", 109), ("2-5*3", -13), ("-(1+2)*3", -9), ("7", 7), ("9" * 32, int("9" * 32))],
)
def test_the_calculator_knows_numbers(calculator, text, value):
    assert calculator.evaluate(text) == value
    assert calculator.calculate("", text, "", {}) == str(value)


@pytest.mark.parametrize(
    "text",
    [
        "", "?", "1+", "2**9", "9" * 33, "1/2", "1.5", "True", "'a'*9", "x", "0" * 9 + "1", "(" * 32, "1\0", "[1][0]",
        "1,2", "__import__('os')", "print(1)", "(lambda:1)()", "1 if 1 else 2", "1<2",
    ],
)  # fmt: skip
def test_and_nothing_else(calculator, text):
    assert calculator.evaluate(text) is None
    assert calculator.calculate("", text, "", {}) == "?"


def test_an_answer_ends_the_game_and_only_the_right_one_is_rewarded(calculator):
    assert calculator.calculate("13*4+57", "=1", "109", {}) is None
    assert calculator.right([""] * 3, ["=109", "109", "=19"], ["109"] * 3, [{}] * 3) == [1.0, 0.0, 0.0]


def parts_of(response):
    """Alternating turns and replies, as ids."""
    pairs = itertools.groupby(zip(response.ids, response.mask, strict=True), key=lambda pair: pair[1])
    return [(trained, [token for token, _ in part]) for trained, part in pairs]


def check_game(calculator, codec, response):
    """Every reply is the calculator's to the turn before it, framed as the codec frames it."""
    parts = parts_of(response)
    assert [trained for trained, _ in parts] == [1, 0] * (response.turns - 1) + [1]
    for (_, turn), (_, reply) in zip(parts[::2], parts[1::2], strict=False):
        assert reply == codec.encode_reply(turn, calculator.calculate("", codec.decode(turn), "", {}))
    sampled = {place for span in response.versions for place in range(span.start, span.end)}
    assert sampled == {place for place, bit in enumerate(response.mask) if bit} or not response.versions
    return len(parts) // 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_from_files_to_journal(calculator, tmp_path, monkeypatch):
    """The policy is random, so most calls are wrong ones; they are played to the end all the same."""
    monkeypatch.setitem(command_bench.ENV, "PYTHONPATH", str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    bench = command_bench.Bench(tmp_path, CONFIG)
    program = [sys.executable, str(EXAMPLES / "calculator.py"), str(CONFIG)]
    subprocess.run(program, check=True, timeout=240, cwd=tmp_path, env=command_bench.ENV)
    try:
        few = [f"run.steps={STEPS}", "rollout.eval.interval_steps=3", "rollout.eval.prompts=16", "run.warm_start=[]"]
        kept = [
            "checkpoint.interval_steps=1",
            "checkpoint.keep_last=9",
        ]  # the journal forgets what all checkpoints hold
        bench.run("run", str(CONFIG), *few, *kept, "batch.groups_per_step=4", timeout_s=600)
    finally:
        bench.stop()
    rows = bench.rows("calculator_cpu")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(1 < row["rollout/turns_mean"] <= 4 for row in rows)
    assert "eval/accuracy" in rows[-1]
    run_dir = RunDir(tmp_path / "runs" / "calculator_cpu")
    codec = Codec.load(load_config(run_dir.config), run_dir.path / "model")
    with sqlite3.connect(run_dir.journal) as journal:
        stored = journal.execute("SELECT payload FROM groups WHERE lease_step IS NOT NULL AND payload NOT NULL")
        groups = [msgspec.msgpack.decode(payload, type=StoredGroup).group for (payload,) in stored]
    assert len(groups) == (STEPS - 1) * 4, "all but those of the first checkpoint"
    assert sum(check_game(calculator, codec, one) for group in groups for one in group.responses) > 20, "replies"
    games = list(read_groups(tmp_path / "data" / "calculator" / "games.jsonl"))
    for game in games[:200]:
        check_group(game)
        check_game(calculator, codec, game.responses[0])
