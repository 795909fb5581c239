"""Tensors mapped out of a larger file against torch.load."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asympo_megatron.conversion.plain_pickle import UnsafePickleError
from asympo_megatron.conversion.stored_tensor import map_stored

BEFORE = b"x" * 4099
"""An odd number of bytes in front, more than a page."""

TENSORS: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: torch.randn(7, 5),
    "bfloat16": lambda: torch.randn(3, 3, 3).bfloat16(),
    "more than a page": lambda: torch.randn(70, 50).half(),
    "transposed": lambda: torch.randn(7, 5).T,
    "part of a storage": lambda: torch.randn(9, 5)[2:8:2, 1:],
    "scalar": lambda: torch.tensor(3, dtype=torch.float64),
    "parameter": lambda: torch.nn.Parameter(torch.randn(2, 3)),
}


class _Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def _archive(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _placed(tmp_path: Path, archive: bytes) -> tuple[Path, int, int]:
    file = tmp_path / "data"
    file.write_bytes(BEFORE + archive + BEFORE)
    return file, len(BEFORE), len(archive)


@pytest.mark.parametrize("kind", TENSORS)
def test_it_is_what_torch_load_reads(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    saved = TENSORS[kind]()
    mapped = map_stored(*_placed(tmp_path, _archive(saved)))
    assert mapped.dtype == saved.dtype
    assert mapped.stride() == saved.stride()
    assert torch.equal(mapped, saved)


def test_the_file_is_not_written_into(tmp_path: Path) -> None:
    place = _placed(tmp_path, _archive(torch.ones(4)))
    before = place[0].read_bytes()
    map_stored(*place).zero_()
    assert place[0].read_bytes() == before


def _edited(archive: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """The same records, one of them changed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(stream, "w") as new:
        assert any(record.endswith(name) for record in old.namelist())
        for record in old.namelist():
            data = old.read(record)
            new.writestr(record, change(data) if record.endswith(name) else data)
    return stream.getvalue()


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "byte order": (lambda a: _edited(a, "byteorder", lambda _: b"big"), "byte order"),
    "more elements than bytes": (
        lambda a: _edited(a, "data.pkl", lambda p: p.replace(b"M\xe8\x03", b"M\xff\xff")),
        "131070 bytes of data from",
    ),
    "cut": (lambda a: a[:-40], "zip archive"),
    "no such data": (
        lambda a: _edited(a, "data.pkl", lambda p: p.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009")),
        "data/9",
    ),
    "beyond its data": (
        lambda a: _edited(a, "data.pkl", lambda p: p.replace(b"QK\x00M\xe8\x03\x85", b"QK\x07M\xe8\x03\x85")),
        "out of bounds",
    ),
    "whole numbers": (lambda _: _archive(torch.arange(4)), "LongStorage, which is no part of a tensor"),
    "several tensors": (lambda _: _archive([torch.ones(1)] * 2), "holds a list, expected a tensor"),
    "code": (lambda _: _archive(_Runs()), "asks for .*builtin.*print, which is no part of a tensor"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_archives(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    archive = _archive(torch.zeros(1000, dtype=torch.bfloat16))
    changed = change(archive)
    assert changed != archive
    with pytest.raises((ValueError, RuntimeError, UnsafePickleError), match=message):
        map_stored(*_placed(tmp_path, changed))
