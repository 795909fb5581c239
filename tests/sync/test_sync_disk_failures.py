"""The disk transport: whole or not at all, damage is found, old versions go and used ones stay."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_versions import TENSORS, publish
from torch import Tensor

from asympo_megatron.errors import PublishError
from asympo_megatron.sync import (
    list_versions,
    prune_versions,
    read_manifest,
    shard_file,
    verify_version,
    version_path,
    write_version,
)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: _flip(path / "model.safetensors"), "model.safetensors has sha256"),
        (lambda path: _cut(path / "model.safetensors"), "model.safetensors has .* bytes, expected"),
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (lambda path: _flip(path / "config.json"), "config.json has sha256"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").unlink(), "not a published version"),
    ],
)
def test_damage_is_found_and_the_file_named(tmp_path: Path, model_files: Path, damage, words: str) -> None:
    path = publish(tmp_path / "w", 1, model_files)
    verify_version(path)
    damage(path)
    with pytest.raises(PublishError, match=words):
        verify_version(path)


def test_a_full_disk_leaves_nothing_and_says_what_to_do(
    tmp_path: Path, model_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "w"
    publish(root, 1, model_files)

    def full(self: shard_file.ShardFile, name: str, tensor: Tensor) -> None:
        self.path.write_bytes(b"half a shard")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_file.ShardFile, "add", full)
    with pytest.raises(PublishError, match=r"v000002 could not be written.*No space left.*Free space.*run\.root"):
        publish(root, 2, model_files)
    assert os.listdir(root) == ["v000001"]


def test_a_really_full_file_gives_the_same_error(tmp_path: Path, model_files: Path) -> None:
    """A size limit on files makes the real writer fail in the middle of a shard."""
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from asympo_megatron.sync import write_version\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "write_version(Path(sys.argv[1]), 1, 1, [('big', torch.zeros(100_000))], 'x', Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "w"), str(model_files)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "PublishError" in result.stderr
    assert "Free space" in result.stderr
    assert os.listdir(tmp_path / "w") == []


def test_a_crash_before_the_rename_leaves_nothing_that_looks_whole(tmp_path: Path, model_files: Path) -> None:
    root = tmp_path / "w"
    code = (
        "import os, sys, torch; from pathlib import Path\n"
        "from asympo_megatron.sync import write_version\n"
        "Path.rename = lambda self, target: os._exit(9) if target.name.startswith('v') else os.rename(self, target)\n"
        "write_version(Path(sys.argv[1]), 4, 4, [('a', torch.ones(3))], 'x', Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(root), str(model_files)]
    assert subprocess.run(command, timeout=120).returncode == 9
    assert len(os.listdir(root)) == 1
    assert list_versions(root) == []
    with pytest.raises(PublishError, match="not a published version"):
        read_manifest(version_path(root, 4))
    publish(root, 4, model_files)
    assert list_versions(root) == [4]
    prune_versions(root, keep_last=1)
    assert os.listdir(root) == ["v000004"]


def test_an_error_of_the_tensor_source_passes_through_and_leaves_nothing(tmp_path: Path, model_files: Path) -> None:
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_version(tmp_path / "w", 1, 1, failing(), "x", model_files)
    assert os.listdir(tmp_path / "w") == []


def test_a_version_number_is_used_once(tmp_path: Path, model_files: Path) -> None:
    path = publish(tmp_path / "w", 1, model_files)
    before = (path / "manifest.json").stat().st_mtime_ns
    assert publish(tmp_path / "w", 1, model_files) == path  # the same weights again: kept
    assert (path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(PublishError, match=r"already holds step 10 .*not step 11 with other"):
        write_version(tmp_path / "w", 1, 11, TENSORS.items(), "other", model_files)


def test_input_that_cannot_be_published(tmp_path: Path, model_files: Path) -> None:
    root = tmp_path / "w"
    with pytest.raises(PublishError, match=r"has no config\.json"):
        write_version(root, 1, 1, TENSORS.items(), "x", tmp_path)
    with pytest.raises(PublishError, match="no tensor was given"):
        write_version(root, 1, 1, [], "x", model_files)
    with pytest.raises(PublishError, match="tensor a was given twice"):
        write_version(root, 1, 1, [("a", torch.ones(1)), ("a", torch.ones(1))], "x", model_files)
    assert os.listdir(root) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match="could not be written"):
        publish(tmp_path / "file", 1, model_files)


def test_prune_keeps_the_newest_and_those_in_use(tmp_path: Path, model_files: Path) -> None:
    root = tmp_path / "w"
    for version in range(1, 7):
        publish(root, version, model_files)
    abandoned, coming = root / ".v000003.1-aa", root / ".v000007.1-bb"
    abandoned.mkdir()
    coming.mkdir()
    assert prune_versions(root, keep_last=2, in_use=[2]) == [1, 3, 4]
    assert list_versions(root) == [2, 5, 6]
    assert not abandoned.exists()
    assert coming.exists()  # newer than every complete version: somebody may be writing it
    assert prune_versions(root, keep_last=0) == [2, 5]
    assert list_versions(root) == [6]
    assert prune_versions(tmp_path / "nowhere", keep_last=1) == []


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
