"""The disk transport: weights as a Hugging Face directory that appears whole or not at all.

root/.v000007.<pid>-<random>/   shards, config, tokenizer, manifest; every file fsynced
root/v000007/                   the same directory after one rename
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from asympo_megatron.errors import PublishError
from asympo_megatron.sync.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    file_digest,
    temporary_path,
    verify_version,
    version_path,
)

SHARD_BYTES = 4 << 30
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
        tensors: (Hugging Face name, tensor) pairs; read once, one shard in memory at a time.
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
    try:
        temporary.mkdir(parents=True)
        names = _copy_model_files(Path(model_files), temporary)
        names += _write_shards(temporary, _prepared(tensors, dtype), shard_bytes)
        files = {name: FileEntry((temporary / name).stat().st_size, file_digest(temporary / name)) for name in names}
        manifest = Manifest(version=version, step=step, checksum=checksum, files=files)
        (temporary / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        for name in (*names, MANIFEST_NAME, "."):
            _fsync(temporary / name)
        temporary.rename(target)
        _fsync(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) and not isinstance(error, PublishError):
            raise PublishError(_unwritable(target, error)) from error
        raise
    return target


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
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensor = tensor.cpu().contiguous()
        # safetensors refuses tensors that share storage (tied embeddings, slices of a fused weight).
        yield name, tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    if not seen:
        raise PublishError("no tensor was given; a version without weights cannot be loaded.")


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> list[str]:
    """Write shards as they fill. Their number is known only at the end, so the final names are given then."""
    shards: list[list[str]] = []
    total_bytes = held_bytes = 0
    held: dict[str, Tensor] = {}
    held_pointers: set[int] = set()

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > shard_bytes:
            flush()
            held, held_bytes, held_pointers = {}, 0, set()
        # A second name of one whole storage: a copy, for the reason given above.
        held[name] = tensor.clone() if tensor.data_ptr() in held_pointers else tensor
        held_pointers.add(tensor.data_ptr())
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    return _name_shards(folder, shards, total_bytes)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> list[str]:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return ["model.safetensors"]
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, file in enumerate(files):
        (folder / f"shard-{number}").rename(folder / file)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return [*files, "model.safetensors.index.json"]


def _copy_model_files(source: Path, folder: Path) -> list[str]:
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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(target: Path, error: BaseException) -> str:
    folder = next(parent for parent in target.parents if parent.exists())
    free_mb = shutil.disk_usage(folder).free / 1e6
    return (
        f"weights {target} could not be written: {error} ({free_mb:.0f} MB free on that file system). Nothing partial "
        "was left behind. Free space, lower sync.keep_last or set run.root to another file system, and resume."
    )
