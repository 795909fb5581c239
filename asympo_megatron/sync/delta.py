"""A version as changes of an earlier one, and the whole version that the two make.

root/v000007/                          a whole version
root/v000008/manifest.json             base: 7; result: size and sha256 of every file of the whole version 8
root/v000008/FILE.safetensors.delta    changed elements; see :mod:`asympo_megatron.sync.delta_file`
root/v000008/FILE                      a changed file without such changes: no weights, or of another layout

Nothing here asks what weights mean: the whole version has its bytes, so its sha256, or there is an error.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from safetensors import SafetensorError

from asympo_megatron.errors import PublishError
from asympo_megatron.files import fsync
from asympo_megatron.sync.delta_file import apply_changes, write_changes
from asympo_megatron.sync.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    file_digests,
    read_manifest,
    temporary_path,
    verify_version,
    version_path,
)

DELTA_SUFFIX = ".delta"
_THREADS = 4
"""Files at a time; each is hashed as it is written."""


def write_delta(root: Path, base: Path, new: Path) -> Path:
    """Publish ``new`` under ``root`` as changes of ``base``.

    Args:
        root: directory of the published versions; ``base`` is one of them, too.
        base, new: local copies, whole.

    Raises:
        PublishError: the version exists with other contents, or could not be written; nothing partial stays behind.
    """
    before, manifest = read_manifest(base), read_manifest(new)
    described = msgspec.structs.replace(manifest, base=before.version, files={}, result=manifest.files)

    def write(folder: Path) -> list[str]:
        names = []
        for name, entry in manifest.files.items():
            if before.files.get(name) == entry:
                continue
            changes = f"{name}{DELTA_SUFFIX}"
            known = name.endswith(".safetensors") and name in before.files
            if known and write_changes(base / name, new / name, folder / changes):
                names.append(changes)
            else:
                names.append(name)
                shutil.copyfile(new / name, folder / name)
        return names

    return _appear(root, described, write)


def copy_version(root: Path, new: Path) -> Path:
    """Publish the local copy ``new`` under ``root`` as it is.

    Raises:
        PublishError: the version exists with other contents, or could not be written; nothing partial stays behind.
    """
    manifest = read_manifest(new)

    def write(folder: Path) -> list[str]:
        for name in manifest.files:
            shutil.copyfile(new / name, folder / name)
        return list(manifest.files)

    return _appear(root, manifest, write)


def _appear(root: Path, described: Manifest, write: Callable[[Path], list[str]]) -> Path:
    """Let a version appear whole or not at all: files by ``write``, a manifest of them, one rename."""
    target = version_path(root, described.version)
    if target.exists():
        there = verify_version(target)
        if (there.step, there.checksum, there.whole) == (described.step, described.checksum, described.whole):
            return target
        raise PublishError(
            f"{target} already holds other weights, of step {there.step}. A version number is never used twice: ask "
            "the controller for the next one."
        )
    temporary = temporary_path(root, described.version, f"{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        names = write(temporary)
        digests = file_digests([temporary / name for name in names])
        sizes = [(temporary / name).stat().st_size for name in names]
        entries = [FileEntry(size, digest) for size, digest in zip(sizes, digests, strict=True)]
        manifest = msgspec.structs.replace(described, files=dict(zip(names, entries, strict=True)))
        (temporary / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        for name in (*names, MANIFEST_NAME, "."):
            fsync(temporary / name)
        temporary.rename(target)
        fsync(root)
    except PublishError:
        raise
    except OSError as error:
        raise PublishError(
            f"weights {target} could not be written: {error}. Nothing partial was left behind. Free space, lower "
            "sync.keep_last or set run.root to another file system, and resume."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def rebuild(target: Path, start: Path, deltas: Sequence[Path]) -> None:
    """Write the whole version that changes make of another one, and check every byte of it.

    Args:
        target: directory to appear; its parent is a local one.
        start: a whole version.
        deltas: the versions after it, ascending; the last one is the version to write.

    Raises:
        PublishError: a file is missing or unreadable, or the result is not what was published; nothing stays behind.
    """
    described = read_manifest([start, *deltas][-1])
    temporary = temporary_path(target.parent, described.version, "building")
    shutil.rmtree(temporary, ignore_errors=True)
    chain = [(path, read_manifest(path).files) for path in deltas]

    def build(name: str) -> str:
        base, changes = start / name, list[Path]()
        for path, files in chain:
            if name in files:
                base, changes = path / name, []
            elif f"{name}{DELTA_SUFFIX}" in files:
                changes.append(path / f"{name}{DELTA_SUFFIX}")
        if not changes:
            shutil.copyfile(base, temporary / name)
            return file_digests([temporary / name])[0]
        return apply_changes(base, changes, temporary / name)

    try:
        temporary.mkdir()
        with ThreadPoolExecutor(_THREADS) as threads:
            digests = dict(zip(described.whole, threads.map(build, described.whole), strict=True))
        for name, entry in described.whole.items():
            if digests[name] != entry.sha256:
                raise PublishError(
                    f"{name} of version {described.version}, made from {start} and {len(deltas)} deltas, has sha256 "
                    f"{digests[name][:16]}..., expected {entry.sha256[:16]}...: it is not what the trainer published."
                )
        whole = msgspec.structs.replace(described, files=described.whole, base=None, result={})
        (temporary / MANIFEST_NAME).write_bytes(msgspec.json.encode(whole))
        temporary.rename(target)
    except PublishError:
        raise
    except (OSError, ValueError, IndexError, SafetensorError) as error:
        raise PublishError(
            f"version {described.version} could not be made from {start} and {len(deltas)} deltas: {error!r}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
