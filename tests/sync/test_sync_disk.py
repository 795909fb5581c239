"""The disk transport writes versions: files, shards, headers, the order in which they get durable."""

import json
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_versions import TENSORS, publish
from torch import Tensor

from asympo_megatron.errors import PublishError
from asympo_megatron.sync import (
    disk,
    list_versions,
    manifest,
    shard_file,
    verify_version,
    write_version,
)


def test_version_holds_weights_model_files_and_manifest(tmp_path: Path, model_files: Path) -> None:
    path = publish(tmp_path / "w", 7, model_files)
    assert path == tmp_path / "w" / "v000007"
    assert {entry.name for entry in path.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "manifest.json",
    }
    loaded = load_file(path / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {k: v.tolist() for k, v in TENSORS.items()}
    manifest = verify_version(path)
    assert (manifest.version, manifest.step, manifest.checksum) == (7, 70, "sum7")
    assert set(manifest.files) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert list_versions(tmp_path / "w") == [7]
    assert os.listdir(tmp_path / "w") == ["v000007"]


def test_shards_stay_below_their_size_and_the_index_finds_every_tensor(tmp_path: Path, model_files: Path) -> None:
    tensors = {f"t{number}": torch.full((10,), float(number)) for number in range(7)}  # 40 bytes each
    path = write_version(tmp_path / "w", 1, 1, tensors.items(), "x", model_files, shard_bytes=90)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    for name, tensor in tensors.items():
        assert torch.equal(load_file(path / index["weight_map"][name])[name], tensor)
    verify_version(path)


def test_dtype_converts_floating_tensors_only(tmp_path: Path, model_files: Path) -> None:
    loaded = load_file(publish(tmp_path / "w", 1, model_files, dtype=torch.bfloat16) / "model.safetensors")
    assert loaded["model.norm.weight"].dtype == torch.bfloat16
    assert loaded["steps"].dtype == torch.int64


def test_tensors_that_share_or_cut_storage_are_written_whole(tmp_path: Path, model_files: Path) -> None:
    fused = torch.arange(12.0).reshape(6, 2)
    tensors = [("q", fused[:2]), ("k", fused[2:4]), ("t", fused.t()), ("a", fused), ("b", fused)]
    path = write_version(tmp_path / "w", 1, 1, tensors, "x", model_files)
    loaded = load_file(path / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {n: t.tolist() for n, t in tensors}


@pytest.mark.parametrize("known", [False, True])
def test_tensors_are_held_one_at_a_time(
    tmp_path: Path, model_files: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Each tensor is released once it is written, long before its shard is full."""
    monkeypatch.setattr(shard_file, "HELD_BYTES", 0)
    alive: list[weakref.ref] = []
    most = 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for number in range(12):
            tensor = torch.full((100,), float(number))
            alive.append(weakref.ref(tensor.untyped_storage()))
            yield f"t{number}", tensor
            del tensor
            most = max(most, sum(reference() is not None for reference in alive))

    described = [(f"t{number}", torch.empty(100, device="meta")) for number in range(12)]
    tensors = shard_file.Announced(described, stream()) if known else stream()
    write_version(tmp_path / "w", 1, 1, tensors, "x", model_files, shard_bytes=4000)
    assert most == 0, "a tensor is given up before the next is gathered"


def test_a_shard_that_is_full_is_hashed_while_the_next_is_written(
    tmp_path: Path, model_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = threading.Event()

    def digests(files: list[Path]) -> list[str]:
        found = manifest.file_digests(files)
        if files[0].name == "shard-0":
            hashed.set()
        return found

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from [("a", torch.ones(10)), ("b", torch.ones(10))]  # the second does not fit: the first shard is full
        assert hashed.wait(60)
        yield "c", torch.ones(10)

    monkeypatch.setattr(disk, "file_digests", digests)
    verify_version(write_version(tmp_path / "w", 1, 1, stream(), "x", model_files, shard_bytes=40))


@pytest.mark.parametrize("known", [False, True])
def test_every_file_is_on_the_disk_before_the_version_has_its_name(
    tmp_path: Path, model_files: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    flushed: set[int] = set()

    def flush(descriptor: int) -> None:
        file = os.fstat(descriptor).st_ino
        if file == (tmp_path / "w").stat().st_ino:  # after the rename
            (version,) = (tmp_path / "w").iterdir()
            assert {each.stat().st_ino for each in (version, *version.iterdir())} == flushed
        flushed.add(file)

    monkeypatch.setattr(os, "fsync", flush)
    tensors = announced(TENSORS.items()) if known else TENSORS.items()
    path = write_version(tmp_path / "w", 1, 1, tensors, "x", model_files, shard_bytes=100)
    assert len(flushed) == 2 + len(os.listdir(path)) == 8


def announced(tensors: Iterable[tuple[str, Tensor]]) -> shard_file.Announced:
    given = list(tensors)
    return shard_file.Announced([(name, tensor.to("meta")) for name, tensor in given], iter(given))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [disk.SHARD_BYTES, 100, 1])
def test_announced_tensors_make_the_same_files(
    tmp_path: Path, model_files: Path, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    for root, tensors in (("a", TENSORS.items()), ("b", announced(TENSORS.items()))):
        write_version(tmp_path / root, 1, 1, tensors, "x", model_files, dtype, shard_bytes)
    first, second = (tmp_path / root / "v000001" for root in "ab")
    assert verify_version(second) == verify_version(first)
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))


@pytest.mark.parametrize("shard_bytes", [disk.SHARD_BYTES, 40])
@pytest.mark.parametrize(
    "given",
    [
        {"a": torch.ones(10), "b": torch.ones(10)},
        {"a": torch.ones(10), "b": torch.ones(10), "d": torch.ones(10)},
        {"a": torch.ones(10), "b": torch.ones(5, 2), "c": torch.ones(10)},
        {"a": torch.ones(10), "b": torch.ones(10), "c": torch.ones(10, dtype=torch.int32)},
        {"a": torch.ones(10), "b": torch.ones(10), "c": torch.ones(10), "d": torch.ones(10)},
    ],
)
def test_tensors_other_than_announced_are_not_published(
    tmp_path: Path, model_files: Path, given: dict[str, Tensor], shard_bytes: int
) -> None:
    described = [(name, torch.empty(10, device="meta")) for name in "abc"]
    tensors = shard_file.Announced(described, given.items())
    with pytest.raises(PublishError, match=r"shard-\d: the tensors differ from those announced"):
        write_version(tmp_path / "w", 1, 1, tensors, "x", model_files, shard_bytes=shard_bytes)
    assert os.listdir(tmp_path / "w") == []


def test_what_a_source_says_behind_its_last_tensor_is_heard(tmp_path: Path, model_files: Path) -> None:
    def damaged() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(3)
        raise KeyboardInterrupt

    tensors = shard_file.Announced([("a", torch.ones(3, device="meta"))], damaged())
    with pytest.raises(KeyboardInterrupt):
        write_version(tmp_path / "w", 1, 1, tensors, "x", model_files)
    assert os.listdir(tmp_path / "w") == []


@pytest.mark.parametrize("held_bytes", [0, 1 << 20])
def test_the_library_reads_what_was_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_bytes: int) -> None:
    """Held back or streamed behind room for the header; every dtype, no elements, no axes, names of any length."""
    monkeypatch.setattr(shard_file, "HELD_BYTES", held_bytes)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{dtype}".ljust(length, "x"): torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype, shape, length in zip(
            shard_file.DTYPES,
            [(), (0,), (1,), (3, 5), (2, 1, 3), (7,), (4, 0), (9,), (2,), (5,)],
            range(1, 100, 10),
            strict=True,
        )
    }
    file = shard_file.ShardFile(tmp_path / "a.safetensors", header_bytes=4096)
    for name, tensor in tensors.items():
        file.add(name, tensor)
    file.close()
    loaded = load_file(tmp_path / "a.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_shard_ends_where_its_header_is_full(
    tmp_path: Path, model_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "HELD_BYTES", 0)
    monkeypatch.setattr(disk, "ShardFile", lambda path: shard_file.ShardFile(path, header_bytes=256))
    tensors = {f"t{number}": torch.full((4,), float(number)) for number in range(9)}
    path = write_version(tmp_path / "w", 1, 1, tensors.items(), "x", model_files)
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    for name, tensor in tensors.items():
        assert torch.equal(load_file(path / index[name])[name], tensor)


def test_a_dtype_without_a_name_in_the_format(tmp_path: Path, model_files: Path) -> None:
    with pytest.raises(PublishError, match=r"tensors of torch.complex64 cannot be written; convert to torch.float64"):
        write_version(tmp_path / "w", 1, 1, [("a", torch.ones(2, dtype=torch.complex64))], "x", model_files)
    assert os.listdir(tmp_path / "w") == []
