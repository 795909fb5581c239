"""The harness of the benchmarks: a missed goal cannot pass, ratios are of pairs, peaks are of the call."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import harness
import pytest

MIB = 1 << 20


def lines_of(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_goals_that_are_met_pass(capsys):
    report = harness.Report("trial")
    assert report.at_most("trial/a", 1.0, "ms", 1.0, dp_size=4)
    assert report.at_least("trial/b", 2.0, "x", 1.0)
    assert report.within("trial/c", 3.0, "x", 2.0, 4.0)
    report.show("trial/d", 123456.789, "tokens")
    assert report.finish() == 0
    out = capsys.readouterr().out
    assert lines_of(out) == [
        {"name": "trial/a", "dp_size": 4, "value": 1.0, "unit": "ms", "goal": "<= 1", "ok": True},
        {"name": "trial/b", "value": 2.0, "unit": "x", "goal": ">= 1", "ok": True},
        {"name": "trial/c", "value": 3.0, "unit": "x", "goal": "2 to 4", "ok": True},
        {"name": "trial/d", "value": 123460.0, "unit": "tokens", "goal": None, "ok": True},
    ]
    assert out.splitlines()[-1] == "PASS"


@pytest.mark.parametrize(
    "miss",
    [
        lambda report: report.at_most("trial/x", 1.01, "ms", 1.0),
        lambda report: report.at_least("trial/x", 0.99, "ms", 1.0),
        lambda report: report.within("trial/x", 1.99, "ms", 2.0, 4.0),
        lambda report: report.within("trial/x", 4.01, "ms", 2.0, 4.0),
        lambda report: report.at_most("trial/x", math.nan, "ms", 1.0),
        lambda report: report.at_least("trial/x", math.nan, "ms", 1.0),
        lambda report: report.within("trial/x", math.nan, "ms", 2.0, 4.0),
    ],
)
def test_one_missed_goal_falls_short(miss, capsys):
    report = harness.Report("trial")
    report.at_most("trial/good", 0.0, "ms", 1.0)
    assert not miss(report)
    report.at_most("trial/good_again", 0.0, "ms", 1.0)
    assert report.finish() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FALLS SHORT"


def test_nothing_measured_is_no_pass(capsys):
    assert harness.Report("trial").finish() == 1
    report = harness.Report("trial")
    report.show("trial/a", 1.0, "ms")
    assert report.finish() == 1
    assert "PASS" not in capsys.readouterr().out.splitlines()


def test_a_program_with_a_missed_goal_exits_with_1():
    code = "import sys, harness; r = harness.Report('t'); r.at_most('t/a', 2.0, 's', 1.0); sys.exit(r.finish())"
    done = subprocess.run([sys.executable, "-c", code], cwd=harness.RESULTS.parent, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "FALLS SHORT"


def test_the_results_file_names_command_commit_and_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/benchmarks/trial.py", "--save", "--root=/a/b/c", "a.b=1e-3"])
    report = harness.Report("trial", save=True, results=tmp_path / "results")
    report.at_most("trial/a", 2.0, "s", 1.0)
    assert report.finish() == 1
    header, figure, verdict = lines_of((tmp_path / "results" / "trial.jsonl").read_text())
    assert header["command"] == "python benchmarks/trial.py --save --root=c a.b=1e-3"
    assert re.fullmatch(r"[0-9a-f]{7,}(\+changes)?|unknown", header["commit"])
    assert re.fullmatch(r"\d+ cores of .+, \d+ GiB, .+", header["hardware"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", header["date"])
    assert figure == {"name": "trial/a", "value": 2.0, "unit": "s", "goal": "<= 1", "ok": False}
    assert verdict == {"verdict": "FALLS SHORT"}


def test_nothing_is_written_unless_asked(tmp_path):
    report = harness.Report("trial", results=tmp_path)
    report.at_most("trial/a", 0.0, "s", 1.0)
    report.finish()
    assert list(tmp_path.iterdir()) == []


def test_pairs_alternate_and_the_ratio_is_the_median_of_pairs():
    """A scripted clock: the machine slows down fivefold on the way, and one pair is disturbed."""
    now, calls = [0.0], []

    def task(name, seconds):
        def run():
            calls.append(name)
            speed = 1.0 if len(calls) < 24 else 5.0
            now[0] += seconds * speed * (100.0 if len(calls) == 10 else 1.0)

        return run

    pairs = harness.measure_pairs(task("ours", 3.0), task("theirs", 2.0), warmup=2, clock=lambda: now[0])
    assert calls[:4] == ["ours", "theirs"] * 2  # warm-up
    assert calls[4:8] == ["ours", "theirs", "theirs", "ours"]
    assert len(pairs.ours_s) == len(pairs.theirs_s) == harness.MIN_PAIRS
    assert pairs.ratio == pytest.approx(1.5, rel=1e-12)
    low, high = pairs.quartiles
    assert low == pytest.approx(1.5, rel=1e-12)
    assert high == pytest.approx(1.5, rel=1e-12)
    assert max(pairs.ours_s) / min(pairs.ours_s) >= 5.0  # a mean of times would have been thrown off


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs=19; a median of ratios needs at least 20"):
        harness.measure_pairs(int, int, pairs=19)


def prepare_buffer(held, used):
    """``held`` bytes of inputs, three times as many on the way to them, then a call that touches ``used`` bytes."""
    inputs = bytearray(b"x" * held)
    scrap = [b"y" * (2 * held)]
    scrap.clear()

    def call():
        return len(inputs) + len(bytearray(b"z") * used)

    return call


def prepare_failure():
    def call():
        raise OSError("no")

    return call


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_the_peak_of_a_child_is_that_of_the_call_alone():
    small = harness.measure_in_child(prepare_buffer, 200 * MIB, 10 * MIB)
    large = harness.measure_in_child(prepare_buffer, 200 * MIB, 100 * MIB)
    assert small.value == 210 * MIB
    assert large.value == 300 * MIB
    assert 8 * MIB <= small.extra_peak_bytes <= 15 * MIB  # neither the inputs nor the peak on the way to them
    assert 98 * MIB <= large.extra_peak_bytes <= 105 * MIB
    assert 0.0 <= small.cpu_s < 30.0


def test_a_child_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="child process ended with code 1"):
        harness.measure_in_child(prepare_failure)
