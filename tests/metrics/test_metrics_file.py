"""metrics.jsonl: valid JSON always, nothing lost across crashes and resumes."""

import json
import math
import resource

import numpy as np
import pytest

from asympo_megatron.errors import RecordError
from asympo_megatron.metrics import MetricsWriter, read_rows
from asympo_megatron.metrics.jsonl import RowTail


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_a_row_is_on_disk_before_write_returns(path):
    writer = MetricsWriter(path)
    writer.write({"step": 1, "reward/mean": 0.5})
    assert path.read_text() == '{"step":1,"reward/mean":0.5}\n'


def test_a_full_disk_is_named_and_leaves_no_row(path):
    writer = MetricsWriter(path)
    writer.write({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
    try:
        for step in (2, 3):  # five bytes fit, then none
            with pytest.raises(RecordError, match=rf"metrics of step {step} cannot be written .*Free space"):
                writer.write({"step": step})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row["step"] for row in read_rows(path)] == [1]
    MetricsWriter(path).write({"step": 2})
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_non_finite_values_become_null(path):
    MetricsWriter(path).write({"step": 1, "a": math.nan, "b": math.inf, "c": [1.0, -math.inf], "d": np.float32("nan")})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": [1.0, None], "d": None}


def test_the_last_row_of_a_step_counts_and_rows_come_by_step(path):
    writer = MetricsWriter(path)
    for step, reward in ((0, 0.0), (1, 0.1), (2, 0.2), (1, 0.9)):
        writer.write({"step": step, "reward/mean": reward})
    assert [(row["step"], row["reward/mean"]) for row in read_rows(path)] == [(0, 0.0), (1, 0.9), (2, 0.2)]


def test_a_resumed_writer_keeps_earlier_rows(path):
    first = MetricsWriter(path)
    first.write({"step": 1})
    first.close()
    MetricsWriter(path).write({"step": 2})
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_a_torn_line_is_left_out_and_the_next_row_starts_on_its_own_line(path):
    writer = MetricsWriter(path)
    writer.write({"step": 1})
    writer.close()
    with path.open("a") as file:
        file.write('{"step":2,"reward/me')
    assert [row["step"] for row in read_rows(path)] == [1]
    MetricsWriter(path).write({"step": 3})
    assert [row["step"] for row in read_rows(path)] == [1, 3]


def test_a_missing_file_has_no_rows(path):
    assert read_rows(path) == []


@pytest.mark.parametrize("line", ["[1, 2]", '{"reward/mean": 1.0}', '{"step": 1.5}'])
def test_another_kind_of_file_is_refused_by_line(tmp_path, line):
    path = tmp_path / "other.jsonl"
    path.write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(RecordError, match=r"line 2: expected an object with an integer 'step'"):
        read_rows(path)


@pytest.mark.parametrize(
    ("row", "words"), [({"a": 1}, "needs an integer 'step'"), ({"step": 4, "a": object()}, "step 4")]
)
def test_a_row_that_cannot_be_written_is_refused(path, row, words):
    with pytest.raises(RecordError, match=words):
        MetricsWriter(path).write(row)


def test_the_tail_reads_each_complete_line_once(path):
    tail = RowTail(path)
    assert tail.poll() == []
    writer = MetricsWriter(path)
    writer.write({"step": 1})
    assert [row["step"] for row in tail.poll()] == [1]
    assert tail.poll() == []
    with path.open("a") as file:
        file.write('{"step":2')
    assert tail.poll() == []
    with path.open("a") as file:
        file.write("}\n")
    writer.write({"step": 3})
    assert [row["step"] for row in tail.poll()] == [2, 3]
