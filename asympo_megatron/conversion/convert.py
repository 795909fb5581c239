"""Checkpoints from Hugging Face to Megatron-Core and back: one process, a few tensors in memory at a time.

A Megatron checkpoint (``torch_dist``) has no layout of its own: Megatron cuts it to TP x PP x VPP x EP when it loads.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from asympo_megatron.config import Config
from asympo_megatron.conversion import bridge
from asympo_megatron.conversion.hf_files import HFFiles
from asympo_megatron.conversion.megatron_weights import (
    MODEL_FILES,
    MegatronWeights,
    Progress,
    find_checkpoint,
    find_model_files,
    read_config,
    report,
)
from asympo_megatron.conversion.names import Entry, entries
from asympo_megatron.conversion.places import find_places
from asympo_megatron.conversion.tensors import hf_shapes, join_from_hf, made_ahead
from asympo_megatron.conversion.torch_dist import write_torch_dist
from asympo_megatron.errors import AsympoError, CheckpointError, ConfigError, PublishError
from asympo_megatron.files import fsync
from asympo_megatron.mcore import marker as markers
from asympo_megatron.mcore.checksum import WholeChecksum
from asympo_megatron.mcore.model_config import DTYPES, plan_model
from asympo_megatron.sync.disk import SHARD_BYTES, copy_model_files, write_model
from asympo_megatron.sync.manifest import Manifest


def hf_to_megatron(config: Config, source: str | Path, target: str | Path, progress: Progress | None = None) -> bool:
    """Write the weights of a Hugging Face directory as a Megatron checkpoint, which ``model.init=TARGET`` starts from.

    A family without a table in ``conversion.names`` goes through Megatron-Bridge, for trainers that know it.

    Args:
        config: its ``parallel`` and ``model.megatron`` are what the checkpoint is to be loaded with: contradictions
            with the model are found here. Tensors keep their dtype.
        source: directory with config.json, safetensors and a tokenizer.
        target: directory to make.

    Returns:
        Whether ``model.init`` starts from it.

    Raises:
        ConfigError, UnknownNameError: the model is not supported, or the layout cannot hold it.
        CheckpointError: the source is damaged or incomplete, or the target exists or cannot be written. Nothing that
            looks whole is left behind.
    """
    source, target = Path(source), Path(target)
    hf_config = read_config(source)
    if bridge.needs_bridge(hf_config):
        with _made_whole(target) as temporary:
            bridge.import_checkpoint(hf_config, source, temporary)
        return False
    facts = plan_model(config, hf_config).facts
    files = HFFiles(source)
    table = list(entries(facts))
    files.check_names((name for entry in table for name in entry.hf), tied=facts.tied)
    dtypes = [_common_dtype(files, entry) for entry in table]
    by_name = {place.name: place for place in find_places(config, hf_config)}
    places = [by_name.pop(entry.megatron) for entry in table]
    assert not by_name, f"parameters without a Hugging Face name: {sorted(by_name)}"
    checksum = WholeChecksum()

    def make(number: int) -> Tensor:
        entry = table[number]
        shapes = hf_shapes(entry, facts)
        parts = [files.read(name, shape) for name, shape in zip(entry.hf, shapes, strict=True)]
        whole = join_from_hf(entry, parts, facts)
        checksum.add(entry.megatron, whole)
        return whole

    wholes = made_ahead(make, len(table))

    def read(number: int) -> Tensor:
        whole = next(wholes)
        report(progress, number + 1, len(table))
        return whole

    with _made_whole(target) as temporary:
        write_torch_dist(temporary, places, dtypes, read)
        (temporary / MODEL_FILES).mkdir()
        copy_model_files(source, temporary / MODEL_FILES)
        names = {value: name for name, value in DTYPES.items()}
        dtype = names.get(dtypes[0], "fp16") if len(set(dtypes)) == 1 else "mixed"
        marker = markers.make_marker(config, facts, step=0, ranks=1, dtype=dtype, checksum=checksum.digits())
        markers.write_marker(temporary, marker)
    return True


def megatron_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    model_files: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write the weights of a Megatron checkpoint as a Hugging Face directory with a manifest of checksums.

    Args:
        source: a converted checkpoint, one of a run (or the run itself), or one of Megatron-LM or slime (a directory
            ``iter_NNNNNNN``, or its parent), saved in any layout.
        target: directory to make.
        model_files: directory with config.json and tokenizer; None: those that the source has.
        dtype: convert to it; None keeps what is stored.
        shard_bytes: largest safetensors file.

    Raises:
        ConfigError, UnknownNameError: the model is not supported.
        CheckpointError: the source is damaged, incomplete or of another model, or the target exists.
        PublishError: the target cannot be written; nothing partial stays behind.
    """
    target = Path(target)
    directory = find_checkpoint(Path(source))
    files = find_model_files(directory, model_files)
    hf_config = read_config(files)
    if bridge.needs_bridge(hf_config):
        if dtype is not None:
            raise ConfigError("Megatron-Bridge keeps the dtype of the checkpoint: leave --dtype out.")
        with _made_whole(target) as temporary:
            bridge.export_checkpoint(hf_config, directory, files, temporary)
        return
    weights = MegatronWeights(source, model_files)
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    described = Manifest(version=0, step=weights.step, checksum=weights.checksum, files={})
    try:
        write_model(
            target,
            _temporary(target),
            described,
            weights.tensors(progress),
            weights.model_files,
            dtype=dtype,
            shard_bytes=shard_bytes,
        )
    except PublishError as error:
        raise CheckpointError(str(error)) from error


def _common_dtype(files: HFFiles, entry: Entry) -> torch.dtype:
    dtypes = {name: files.dtype(name) for name in entry.hf}
    if len(set(dtypes.values())) > 1:
        raise CheckpointError(f"{files.directory}: tensors of one parameter differ in dtype: {dtypes}. Convert them.")
    return next(iter(dtypes.values()))


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} exists already; nothing is overwritten. Remove it or choose another name.")


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A directory to fill; it gets its name when it is complete and on the disk, and is removed if that fails."""
    _refuse_existing(target)
    temporary = _temporary(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            fsync(path)
        temporary.rename(target)
        fsync(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, AsympoError):
            raise CheckpointError(
                f"{target} could not be written: {error}. Nothing partial was left behind; free some space."
            ) from error
        raise


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
