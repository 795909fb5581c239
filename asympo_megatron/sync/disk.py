"""The disk transport: weights as a Hugging Face directory that appears whole or not at all.

root/.v000007.<pid>-<random>/   shards, config, tokenizer, manifest; every file fsynced
root/v000007/                   the same directory after one rename
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from asympo_megatron.errors import AsympoError, PublishError
from asympo_megatron.files import fsync
from asympo_megatron.sync.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    file_digests,
    temporary_path,
    verify_version,
    version_path,
)
from asympo_megatron.sync.shard_file import Announced, AnnouncedShardFile, Header, ShardFile, cut

SHARD_BYTES = 4 << 30
_SEALERS = 8
"""Threads that bring files to the disk and hash them."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def write_version(
    root: str | Path,
    version: int,
    step: int,
    tensors: Iterable[tuple[str, Tensor]],
    checksum: str,
    model_files: str | Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Publish one weight version under ``root``.

    Args:
        root: directory of all versions; created if missing.
        version: number of this version, never used before.
        step: optimizer steps that led to these weights.
        tensors: (Hugging Face name, tensor) pairs; read once, one in memory at a time. Of :class:`Announced` ones,
            files are hashed while they are written.
        checksum: checksum of the weights, written into the manifest.
        model_files: directory with config.json and tokenizer files, copied beside the weights.
        dtype: floating tensors are converted to it; None keeps theirs.
        shard_bytes: largest safetensors file, except where one tensor alone is larger.

    Returns:
        The directory ``root/vNNNNNN``. If it was already there, whole and of the same step and checksum, it is kept.

    Raises:
        PublishError: the version exists with other contents, or could not be written; nothing partial stays behind.
    """
    target = version_path(root, version)
    if target.exists():
        return _existing(target, step, checksum)
    temporary = temporary_path(root, version, f"{os.getpid()}-{secrets.token_hex(4)}")
    described = Manifest(version=version, step=step, checksum=checksum, files={})
    write_model(target, temporary, described, tensors, model_files, dtype, shard_bytes)
    return target


def write_model(
    target: Path,
    temporary: Path,
    described: Manifest,
    tensors: Iterable[tuple[str, Tensor]],
    model_files: str | Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory at ``temporary`` and rename it to ``target``; one tensor in memory at a time.

    Args:
        described: manifest without its files, which are added.
        tensors, model_files, dtype, shard_bytes: see :func:`write_version`.

    Raises:
        PublishError: it could not be written; nothing partial stays behind.
    """
    try:
        temporary.mkdir(parents=True)
        with ThreadPoolExecutor(_SEALERS, "seal") as threads:
            names = copy_model_files(Path(model_files), temporary)
            sealed = [_seal(temporary / name, threads) for name in names]
            headers = []
            for header, entry in _shards(temporary, tensors, dtype, shard_bytes, threads):
                headers.append(header)
                sealed.append(entry)
            entries = [entry() for entry in sealed]
            names += _name_shards(temporary, headers)
            entries += [_seal(temporary / name, threads)() for name in names[len(entries) :]]
        manifest = msgspec.structs.replace(described, files=dict(zip(names, entries, strict=True)))
        (temporary / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        for name in (MANIFEST_NAME, "."):
            fsync(temporary / name)
        temporary.rename(target)
        fsync(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, AsympoError):
            raise PublishError(_unwritable(target, error)) from error
        raise


def _existing(target: Path, step: int, checksum: str) -> Path:
    manifest = verify_version(target)
    if (manifest.step, manifest.checksum) == (step, checksum):
        return target
    raise PublishError(
        f"{target} already holds step {manifest.step} with checksum {manifest.checksum}, not step {step} with "
        f"{checksum}. A version number is never used twice: ask the controller for the next one."
    )


def _prepared(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise PublishError(f"tensor {name} was given twice; each name of a version is written once.")
        seen.add(name)
        yield name, _converted(tensor.detach(), dtype).cpu().contiguous()
        del tensor  # before the next one is gathered
    if not seen:
        raise PublishError("no tensor was given; a version without weights cannot be loaded.")


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _seal(file: Path, threads: ThreadPoolExecutor) -> Callable[[], FileEntry]:
    """Bring a file that is whole to the disk and hash it, while others are written; the call waits for both."""
    size = file.stat().st_size
    flush, digest = threads.submit(fsync, file), threads.submit(file_digests, [file])

    def entry() -> FileEntry:
        flush.result()
        return FileEntry(size, digest.result()[0])

    return entry


def _shards(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    shard_bytes: int,
    threads: ThreadPoolExecutor,
) -> Iterator[tuple[Header, Callable[[], FileEntry]]]:
    """Write ``folder/shard-N`` for N = 0, 1, ...; each is handed out as soon as it is full."""
    prepared = _prepared(tensors, dtype)
    if isinstance(tensors, Announced):
        headers = cut(((name, _converted(tensor, dtype)) for name, tensor in tensors.described), shard_bytes)
        for number, header in enumerate(headers):
            file = folder / f"shard-{number}"
            with AnnouncedShardFile(file, header) as announced:
                # Behind the last one the source may still have something to say: it is read to its end.
                for name, tensor in prepared if header is headers[-1] else islice(prepared, len(header.names)):
                    announced.add(name, tensor)
                    del tensor
            yield header, partial(FileEntry, file.stat().st_size, announced.digest())
        return
    shard, number = ShardFile(folder / "shard-0"), 0
    try:
        for name, tensor in prepared:
            if not shard.fits(name, tensor, shard_bytes):
                shard.close()
                yield shard.header, _seal(shard.path, threads)
                number += 1
                shard = ShardFile(folder / f"shard-{number}")
            shard.add(name, tensor)
            del tensor
        shard.close()
        yield shard.header, _seal(shard.path, threads)
    finally:
        shard.abandon()


def _name_shards(folder: Path, headers: list[Header]) -> list[str]:
    """Their number is known only at the end, so the final names are given then; with an index if there are several."""
    if len(headers) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return ["model.safetensors"]
    files = [f"model-{number:05d}-of-{len(headers):05d}.safetensors" for number in range(1, len(headers) + 1)]
    for number, file in enumerate(files):
        (folder / f"shard-{number}").rename(folder / file)
    weight_map = {name: file for file, header in zip(files, headers, strict=True) for name in header.names}
    index = {"metadata": {"total_size": sum(header.data_bytes for header in headers)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return [*files, "model.safetensors.index.json"]


def copy_model_files(source: Path, folder: Path) -> list[str]:
    """Copy config.json, tokenizer, chat template and generation settings, not weights; returns their names.

    Raises:
        PublishError: ``source`` has no config.json.
    """
    if not (source / "config.json").is_file():
        raise PublishError(
            f"{source} has no config.json, so no engine could load the weights. "
            "Set model.path to a Hugging Face directory, or model.hf."
        )
    names = []
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHT_SUFFIXES):
            if file.name == MANIFEST_NAME:
                continue
            shutil.copyfile(file, folder / file.name)
            names.append(file.name)
    return names


def _unwritable(target: Path, error: BaseException) -> str:
    folder = next(parent for parent in target.parents if parent.exists())
    free_mb = shutil.disk_usage(folder).free / 1e6
    return (
        f"weights {target} could not be written: {error} ({free_mb:.0f} MB free on that file system). Nothing partial "
        "was left behind. Free space, lower sync.keep_last or set run.root to another file system, and resume."
    )
