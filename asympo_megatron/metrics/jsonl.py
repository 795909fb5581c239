"""metrics.jsonl: the record of a run that everything else is drawn from. One JSON object a line.

A row belongs to a ``step``, the number of completed optimizer steps; row 0 is the state before training. A step may be
written again (an evaluation that ends later, a resumed trainer): the last row of a step counts. A trainer begins with
the row of the step it goes on from, under a new ``incarnation``: later rows of earlier trainers are of weights that are
lost.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from asympo_megatron.errors import RecordError

log = logging.getLogger(__name__)

Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to a file; each row is handed to the operating system before ``write`` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)  # a row that does not fit is not tried again at the end
        if _ends_torn(self.path):
            self._file.write(b"\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. NaN and infinite values become null: they are not JSON.

        Raises:
            RecordError: the row cannot be encoded, or the disk is full.
        """
        line = encode_row(row) + b"\n"
        try:
            if self._file.write(line) == len(line):
                return
            reason = "no space left"
        except OSError as error:
            reason = str(error)
        raise RecordError(
            f"the metrics of step {row['step']} cannot be written to {self.path}: {reason}. Free space and start the "
            "same command again: it goes on from the last checkpoint."
        )

    def close(self) -> None:
        self._file.close()


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of JSON without its newline.

    Raises:
        RecordError: no integer ``step``, or a value that JSON cannot hold.
    """
    if not isinstance(row.get("step"), int):
        raise RecordError(f"a metrics row needs an integer 'step', got {row.get('step')!r}.")
    try:
        return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        raise RecordError(f"metrics row of step {row['step']}: {error}. Write numbers, strings and lists.") from error


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a run by step, one a step: the last that was written. A missing file has none.

    The first row of an incarnation ends what earlier ones did after that step. A trainer that was replaced may still
    write: its rows do not count.

    A line that was torn by a crash is left out.

    Raises:
        RecordError: a line is JSON but not a row, so the file is something else.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows: dict[int, Row] = {}
    newest = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = decode_line(line, f"{path}, line {number}")
            if row is None or row.get("incarnation", 0) < newest:
                continue
            if row.get("incarnation", 0) > newest:
                newest = row["incarnation"]
                rows = {step: kept for step, kept in rows.items() if step < row["step"]}
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def decode_line(line: bytes, where: str) -> Row | None:
    """The row of a line; None for an empty or torn one."""
    if not line.strip():
        return None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        log.warning("%s: torn line left out", where)
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise RecordError(f"{where}: expected an object with an integer 'step'. Is this a metrics.jsonl?")
    return row


class RowTail:
    """Reads what another process appends to a metrics file, without reading anything twice."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._offset = 0

    def poll(self) -> list[Row]:
        """Rows completed since the last call, in the order of the file."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        found = (decode_line(line, str(self._path)) for line in complete.splitlines())
        return [row for row in found if row is not None]


def _ends_torn(path: Path) -> bool:
    size = path.stat().st_size
    if size == 0:
        return False
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read() != b"\n"
