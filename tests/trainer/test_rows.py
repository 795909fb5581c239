"""Metrics rows: evaluations join the row of the step they judged; lag figures; a resumed clock."""

import pytest

from asympo_megatron import protocol
from asympo_megatron.metrics import MetricsWriter, read_rows
from asympo_megatron.trainer.rows import MetricsRows, lag_figures


def response(lag, reward=1.0):
    return protocol.LeasedResponse(0, 0, 4, 3, 3, 0.5, reward, lag)


def lease(step, lags, evaluations=()):
    return protocol.LeaseReply(True, step, [response(lag) for lag in lags], {"reward/mean": 0.5}, list(evaluations))


LAPS = {"time/wait_s": 0.25, "time/step_s": 0.5}


def evaluation(step, accuracy):
    return protocol.Evaluation(step, version=step + 7, accuracy=accuracy, responses=4, mean_tokens=3.0, seconds=0.1)


@pytest.fixture
def written(tmp_path):
    rows = MetricsRows(MetricsWriter(tmp_path / "metrics.jsonl"), [])
    rows.start(1, 0)
    rows.write(1, lease(0, [0, 0], [evaluation(0, 0.25)]), {"J": 0.5, "tokens": 100.0}, "aa", LAPS)
    rows.write(2, lease(1, [1, 3]), {"J": 0.25, "tokens": 100.0}, "bb", LAPS)
    rows.finish([evaluation(2, 0.75)])
    return tmp_path / "metrics.jsonl"


def test_rows_of_a_run(written):
    rows = read_rows(written)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row.get("eval/accuracy") for row in rows] == [0.25, None, 0.75]
    assert rows[2]["eval/step"] == 2
    assert rows[2]["train/weights_checksum"] == "bb"  # the row of the step survives the late evaluation
    assert rows[2]["train/J"] == 0.25
    assert rows[1]["train/tokens_per_s"] == pytest.approx(200.0)
    assert {row["incarnation"] for row in rows} == {1}


def test_a_resumed_run_keeps_earlier_rows_and_its_clock(written):
    before = read_rows(written)[1]["time_s"]
    rows = MetricsRows(MetricsWriter(written), [])
    rows.start(2, 1)
    rows.write(2, lease(1, [1, 3], [evaluation(1, 0.5)]), {"J": 0.125, "tokens": 1.0}, "bb", LAPS)
    found = read_rows(written)
    assert [row["incarnation"] for row in found] == [1, 2, 2]
    assert found[1]["train/J"] == 0.5
    assert found[1]["eval/accuracy"] == 0.5
    assert found[2]["train/J"] == 0.125
    assert found[2]["time_s"] >= before


def test_a_late_row_of_a_replaced_trainer_does_not_count(written):
    new, old = MetricsRows(MetricsWriter(written), []), MetricsRows(MetricsWriter(written), [])
    old.start(1, 1)
    new.start(2, 1)
    new.write(2, lease(1, [0]), {"J": 0.5}, "new", LAPS)
    old.write(2, lease(1, [0]), {"J": 0.25}, "old", LAPS)
    assert read_rows(written)[2]["train/weights_checksum"] == "new"


@pytest.mark.parametrize("source_counts", [True, False])
def test_what_a_crash_undid_does_not_count_once_the_run_goes_on(tmp_path, source_counts):
    path = tmp_path / "metrics.jsonl"
    dead = MetricsRows(MetricsWriter(path), [])
    dead.start(1 if source_counts else 0, 0)
    for step in range(1, 9):
        dead.write(step, lease(step - 1, [0]), {"tokens": 1.0}, f"dead {step}", LAPS)
    rows = MetricsRows(MetricsWriter(path), [])
    rows.start(2 if source_counts else 0, 5)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4, 5]
    rows.write(6, lease(5, [0], [evaluation(2, 0.5)]), {"tokens": 1.0}, "alive", LAPS)
    found = read_rows(path)
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4, 5, 6], "an evaluation of an old step ends nothing"
    assert [row.get("train/weights_checksum") for row in found[4:]] == ["dead 4", "dead 5", "alive"]
    assert found[2]["eval/accuracy"] == 0.5
    assert found[6]["incarnation"] == 2
    dead.write(9, lease(8, [0]), {"tokens": 1.0}, "dead 9", LAPS)
    if source_counts:
        assert read_rows(path) == found, "nor does a trainer that was replaced go on"


def test_a_failing_sink_is_left_out_and_the_file_goes_on(tmp_path):
    class Broken:
        calls = 0

        def write(self, row):
            self.calls += 1
            raise ConnectionError("tracker is down")

        def close(self):
            raise AssertionError("not ours any more")

    sink = Broken()
    rows = MetricsRows(MetricsWriter(tmp_path / "metrics.jsonl"), [sink])
    rows.start(1, 0)
    rows.write(1, lease(0, [0]), {}, "aa", LAPS)
    rows.finish([])
    assert sink.calls == 1
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]


def test_lag_figures():
    figures = lag_figures([response(lag) for lag in (0, 3, 3, 1)])
    assert figures == {"lag/mean": 1.75, "lag/max": 3, "lag/min": 0, "lag/histogram": [1, 1, 0, 2]}
