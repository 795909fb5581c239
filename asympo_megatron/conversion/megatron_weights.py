"""The Hugging Face tensors that a Megatron checkpoint holds: of our conversion, of a run, of Megatron-LM or slime."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asympo_megatron.config import Config, RunDir, load_config
from asympo_megatron.conversion.names import Entry, entries
from asympo_megatron.conversion.places import Place, find_places
from asympo_megatron.conversion.tensors import hf_shapes, made_ahead, split_for_hf
from asympo_megatron.conversion.torch_dist import TorchDistFiles
from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore import marker as markers
from asympo_megatron.mcore.checkpoints import Checkpoints
from asympo_megatron.mcore.checksum import WholeChecksum
from asympo_megatron.mcore.hf_config import ModelFacts, read_hf_config
from asympo_megatron.sync.shard_file import Announced

MODEL_FILES = "hf"
"""Folder of a converted checkpoint with config.json and the tokenizer, for the way back."""

Progress = Callable[[int, int], None]
"""Called with the parameters done and their number."""

_STORED = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "ffn_hidden_size": "ffn_size",
    "kv_channels": "head_dim",
}
"""Training arguments of Megatron-LM that must agree with config.json, and the fact each of them is."""


class MegatronWeights:
    """The Hugging Face tensors that a Megatron checkpoint holds.

    Args:
        source, model_files: see :func:`megatron_to_hf`.

    Raises:
        CheckpointError, ConfigError: see :func:`megatron_to_hf`.
    """

    def __init__(self, source: str | Path, model_files: str | Path | None = None) -> None:
        self.directory = find_checkpoint(Path(source))
        self.model_files = find_model_files(self.directory, model_files)
        hf_config = read_config(self.model_files)
        self.facts = read_hf_config(hf_config)
        self._files = TorchDistFiles(self.directory)
        _check_arguments(self.directory, self._files.arguments(), self.facts)
        self._places: Mapping[str, Place] = {place.name: place for place in find_places(Config(), hf_config)}
        unread = self._files.unread(self._places.values())
        if unread:
            raise CheckpointError(
                f"{self.directory} holds {len(unread)} tensor(s) that config.json has no place for, e.g. {unread[0]}. "
                "Give the config.json of this checkpoint's model."
            )
        marker = _marker_of(self.directory)
        self.step, self.checksum = marker.get("step", 0), marker.get("checksum", "")

    def tensors(self, progress: Progress | None = None) -> Announced:
        """(name, tensor) in the order of the forward pass.

        Raises:
            CheckpointError: while they are read: a damaged file; at the end, if all together are not what was saved.
        """
        table = list(entries(self.facts))
        described = [
            (name, torch.empty(shape, dtype=self._files.dtype(self._places[entry.megatron]), device="meta"))
            for entry in table
            for name, shape in zip(entry.hf, hf_shapes(entry, self.facts), strict=True)
        ]
        return Announced(described, self._read(table, progress))

    def _read(self, table: list[Entry], progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
        checksum = WholeChecksum()

        def make(number: int) -> Tensor:
            whole = self.parameter(table[number].megatron)
            if self.checksum:
                checksum.add(table[number].megatron, whole)
            return whole

        wholes = made_ahead(make, len(table))
        for number, (entry, whole) in enumerate(zip(table, wholes, strict=True)):
            yield from split_for_hf(entry, whole, self.facts)
            report(progress, number + 1, len(table))
        if self.checksum and checksum.digits() != self.checksum:
            raise CheckpointError(
                f"{self.directory} was saved with weights of checksum {self.checksum} and holds {checksum.digits()}: "
                "its files are damaged. Copy them again."
            )

    def parameter(self, name: str) -> Tensor:
        """One whole Megatron parameter by its global name (see ``mcore.shards``)."""
        return self._files.read(self._places[name])


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        CheckpointError: missing or not JSON.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory} has no readable config.json: {error}. Give a model's directory.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / 'config.json'} holds a {type(config).__name__}, expected a mapping.")
    return config


def find_checkpoint(source: Path) -> Path:
    """The directory with the tensors: the source itself, the latest of Megatron-LM, or the newest of a run."""
    latest = source / "latest_checkpointed_iteration.txt"
    if latest.is_file():
        text = latest.read_text(errors="replace").strip()
        if text != "release" and not (text.isascii() and text.isdigit()):
            raise CheckpointError(f"{latest} holds {text[:20]!r}, expected an iteration. Give its iter_NNNNNNN itself.")
        return source / (text if text == "release" else f"iter_{int(text):07d}")
    if (source / "metadata.json").is_file():
        return source
    try:
        return Checkpoints.find(source)
    except CheckpointError:
        raise CheckpointError(
            f"{source} holds no complete Megatron checkpoint. Give one that was converted, the directory of a run, or "
            "an iter_NNNNNNN of Megatron-LM or slime."
        ) from None


def find_model_files(directory: Path, given: str | Path | None) -> Path:
    """Directory with config.json: given, kept in the checkpoint, or what the run which wrote it began with."""
    for candidate in [Path(given)] if given else _likely_model_files(directory):
        if (candidate / "config.json").is_file():
            return candidate
    raise CheckpointError(
        f"{given or directory} has no config.json. Give the directory of the Hugging Face model that the checkpoint "
        "began with: --hf DIR."
    )


def _likely_model_files(directory: Path) -> Iterator[Path]:
    run = RunDir(directory.parent.parent)
    yield directory / MODEL_FILES
    yield run.path / "model"
    if directory.parent == run.checkpoints and run.config.is_file():  # elsewhere a config.yaml is anybody's
        path = load_config(run.config).model.path
        if path is not None:
            yield Path(path)


def _check_arguments(directory: Path, stored: Mapping[str, Any], facts: ModelFacts) -> None:
    """Megatron-LM stores its arguments: a config.json of another model is noticed by name, not by shape."""
    for name, fact in _STORED.items():
        value, wanted = stored.get(name), getattr(facts, fact)
        if isinstance(value, int) and value != wanted:
            raise CheckpointError(
                f"{directory} was trained with {name}={value}, but config.json says {wanted}. "
                "Give the directory of its own Hugging Face model: --hf DIR."
            )


def _marker_of(directory: Path) -> dict[str, Any]:
    return markers.read_marker(directory) if (directory / markers.MARKER).is_file() else {}


def report(progress: Progress | None, done: int, total: int) -> None:
    """Call ``progress``, if there is one."""
    if progress is not None:
        progress(done, total)
