"""Tensors of a Hugging Face directory by name, read one at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asympo_megatron.conversion.names import EMBEDDING, HEAD
from asympo_megatron.errors import CheckpointError
from asympo_megatron.sync.shard_file import DTYPES as SAFETENSORS_DTYPES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

MAPPED_BYTES = 64 << 20
"""Pages of a mapped file stay in memory until it is closed: it is opened anew after so many bytes."""

_DERIVED = ("rotary_emb.inv_freq",)
"""Tensors of older exports that follow from the config."""


class HFFiles:
    """The safetensors of one directory.

    Args:
        directory: holds model.safetensors, or its shards with their index.

    Raises:
        CheckpointError: no safetensors, an index that cannot be read or names files that are not there.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file, self._mapped = "", 0
        self._open: Any = None
        self.files = self._find_files()

    def check_names(self, wanted: Iterable[str], *, tied: bool) -> None:
        """Exactly the wanted tensors are there; of a tied output layer a copy may be.

        Raises:
            CheckpointError: tensors are missing, there is no place for them, or that copy is none.
        """
        wanted = set(wanted)
        (embedding,), (head,) = EMBEDDING.hf, HEAD.hf
        missing = sorted(wanted - set(self.files))
        if missing:
            raise CheckpointError(
                f"{self.directory}: the safetensors lack {len(missing)} tensor(s) of the model, e.g. {missing[0]}."
            )
        ignored = {head} if tied else set()
        unknown = sorted(name for name in self.files if name not in wanted | ignored and not name.endswith(_DERIVED))
        if unknown:
            raise CheckpointError(
                f"{self.directory}: the safetensors hold {len(unknown)} tensor(s) that config.json has no place for, "
                f"e.g. {unknown[0]}."
            )
        if tied and head in self.files and not torch.equal(self.read(head), self.read(embedding)):
            raise CheckpointError(
                f"{self.directory}: config.json ties the embeddings (tie_word_embeddings), but {head} differs from "
                f"{embedding}. Correct the one that is wrong."
            )

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One tensor; its memory is the file's, so nobody writes into it.

        Args:
            shape: what the config demands of it; None: anything.

        Raises:
            CheckpointError: not readable, of another shape, or not made of floating-point numbers.
        """
        self.dtype(name)
        with self._readable(name):
            tensor: Tensor = self._opened(self.files[name]).get_tensor(name)
        self._mapped += tensor.nbytes
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.directory}: {name} has shape {tuple(tensor.shape)}, but config.json says {shape}."
            )
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, read off its file's header.

        Raises:
            CheckpointError: see :meth:`read`.
        """
        with self._readable(name):
            named: str = self._opened(self.files[name]).get_slice(name).get_dtype()
        for dtype in FLOATS:
            if SAFETENSORS_DTYPES[dtype] == named:
                return dtype
        known = ", ".join(SAFETENSORS_DTYPES[dtype] for dtype in FLOATS)
        raise CheckpointError(
            f"{self.directory}: {name} has dtype {named}, expected one of {known}. Quantized weights are not "
            "supported: start from the original ones."
        )

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.directory / self.files[name]} cannot be read: {type(error).__name__}: {error}. "
                "The file is damaged or incomplete: copy it again."
            ) from error

    def _opened(self, file: str) -> Any:
        if file != self._file or self._mapped > MAPPED_BYTES:
            self._file, self._mapped = file, 0
            self._open = safe_open(self.directory / file, framework="pt")
        return self._open

    def _find_files(self) -> Mapping[str, str]:
        """Tensor name -> file name."""
        index = self.directory / INDEX
        if index.is_file():
            return self._read_index(index)
        if not (self.directory / SINGLE).is_file():
            raise CheckpointError(
                f"{self.directory} has neither {SINGLE} nor {INDEX}. Give a Hugging Face directory with safetensors "
                "(model.path)."
            )
        try:
            return dict.fromkeys(self._opened(SINGLE).keys(), SINGLE)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.directory / SINGLE} cannot be read: {error}. The file is damaged or incomplete: copy it again."
            ) from error

    def _read_index(self, index: Path) -> Mapping[str, str]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors: {error!r}. Copy it again.") from error
        for file in set(files.values()):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{index} names the file {file!r}; expected a .safetensors file beside it.")
            if not (self.directory / file).is_file():
                raise CheckpointError(f"{self.directory / file} is missing, though {INDEX} names it. Copy it again.")
        return files
