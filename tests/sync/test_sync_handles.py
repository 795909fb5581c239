"""Memory that another process maps by name, and messages that ask for more than tensors."""

import base64
import multiprocessing
import pickle
import shutil
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from asympo_megatron.errors import EngineError, PublishError
from asympo_megatron.protocol import BucketInfo
from asympo_megatron.sync.handles import SharedBuffer, open_message

INFO = BucketInfo(["a", "none", "half"], ["float32", "float32", "bfloat16"], [[2, 5], [0, 4], [3]])


def bucket(value: float) -> torch.Tensor:
    parts = [torch.arange(10.0) + value, torch.full((3,), value).bfloat16()]
    return torch.cat([part.view(torch.uint8) for part in parts])


def read_messages(pipe: Connection) -> None:
    """Another process: opens what it is sent and tells what it sees, as a receiver that copies does."""
    while (message := pipe.recv()) is not None:
        tensors = open_message(message, "flattened_bucket")
        seen = {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in tensors.items()}
        del tensors  # before the answer: the memory is gone when the last process has let go
        pipe.send(seen)


def test_another_process_sees_what_the_memory_holds_now() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=read_messages, args=(there,), daemon=True)
    process.start()
    there.close()
    buffer = SharedBuffer(1000)
    path = Path("/dev/shm" + buffer._storage._share_filename_cpu_()[1].decode())
    for value in (1.0, 2.0, 3.0):
        buffer.fill(bucket(value))
        here.send(buffer.message(INFO))
        assert here.recv() == {
            "a": ("torch.float32", (torch.arange(10.0) + value).view(2, 5).tolist()),
            "half": ("torch.bfloat16", [value] * 3),
            "none": ("torch.float32", []),
        }
    assert path.stat().st_size >= 1000
    del buffer
    assert not path.exists(), "no reference is left over"
    here.send(None)
    process.join(60)


def test_memory_that_does_not_fit_is_an_error_before_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    free = types.SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(PublishError, match=r"bucket of 101 bytes does not fit into /dev/shm, where 100 are free"):
        SharedBuffer(101)
    SharedBuffer(100)


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def encoded(content: Any) -> str:
    return base64.b64encode(pickle.dumps(content)).decode()


def test_a_message_that_asks_for_anything_else_is_not_obeyed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    nested = torch.storage._load_from_bytes, pickle.dumps(Calls(Path.touch, mark), protocol=2)
    storage = reductions.rebuild_storage_filename
    elsewhere = [
        Calls(storage, torch.UntypedStorage, b"/run/other.sock", b"/torch_1_2_3", 8),
        Calls(storage, torch.UntypedStorage, b"/tmp/torch-shm-dir-x/manager.sock", b"/sem.other", 8),
    ]
    with pytest.raises(EngineError, match=r"asks for pathlib\.Path\.touch"):
        open_message(encoded(Calls(Path.touch, mark)), None)
    with pytest.raises(EngineError, match="serialized tensors cannot be read"):
        open_message(encoded(Calls(*nested)), None)
    for content in elsewhere:
        with pytest.raises(EngineError, match="names memory that torch does not share"):
            open_message(encoded(content), None)
    with pytest.raises(EngineError, match=r"asks for torch\.hub\.load"):
        open_message(encoded(Calls(torch.hub.load, "a/b", "c")), None)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("message", "load_format"),
    [
        ("no base64!", None),
        (base64.b64encode(b"garbage").decode(), None),
        ("", None),
        (encoded([("a", 1)]), None),
        (encoded([(1, torch.zeros(1))]), None),
        (encoded(torch.zeros(2)), None),
        (encoded({"metadata": []}), "flattened_bucket"),
        (encoded({"flattened_tensor": torch.zeros(4).view(torch.uint8), "metadata": [1]}), "flattened_bucket"),
    ],
)
def test_what_is_no_message_is_an_error(message: str, load_format: str | None) -> None:
    with pytest.raises(EngineError, match="serialized tensors cannot be read"):
        open_message(message, load_format)


def test_tensors_by_value() -> None:
    given = [("a", torch.arange(6).view(2, 3)), ("half", torch.ones(3).bfloat16())]
    got = open_message(encoded(given), None)
    assert list(got) == ["a", "half"]
    assert all(torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype for name, tensor in given)
