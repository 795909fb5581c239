"""Hugging Face safetensors -> Megatron-Core: every rank reads what it holds, whatever the layout."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asympo_megatron.conversion.names import entries
from asympo_megatron.conversion.tensors import hf_shapes, join_from_hf
from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore import Learner

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DERIVED = ("rotary_emb.inv_freq",)
"""Tensors of older exports that follow from the config."""


def load_hf(learner: Learner, directory: str | Path) -> None:
    """Collective: copy the weights of a Hugging Face directory into the learner. Its step counter stays.

    Raises:
        CheckpointError: on every rank: no safetensors, a tensor that is missing, unknown or of another shape.
    """
    problem: CheckpointError | None = None
    try:
        _load(learner, Path(directory))
    except CheckpointError as error:
        problem = error
    except (SafetensorError, OSError, ValueError) as error:
        problem = CheckpointError(f"{directory} cannot be read: {type(error).__name__}: {error}")
    _agree(learner, problem)
    learner.weights_changed()


@torch.no_grad()
def _load(learner: Learner, directory: Path) -> None:
    facts = learner.plan.facts
    with ExitStack() as stack:
        reader = _Reader(stack, directory)
        table = list(entries(facts))
        _check_names(reader, {name for entry in table for name in entry.hf}, tied=facts.tied)
        by_name = {entry.megatron: entry for entry in table}
        for shard in learner.shards():
            entry = by_name["embedding.word_embeddings.weight" if shard.is_copy else shard.name]
            parts = []
            for name, shape in zip(entry.hf, hf_shapes(entry, facts), strict=True):
                part = reader.read(name)
                if tuple(part.shape) != shape:
                    raise CheckpointError(
                        f"{directory}: {name} has shape {tuple(part.shape)}, but config.json says {shape}."
                    )
                parts.append(part)
            shard.param.copy_(shard.take(join_from_hf(entry, parts, facts)))


class _Reader:
    """Tensors by name from one file or from sharded files, opened once and mapped lazily."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack, self._directory = stack, directory
        self._open: dict[str, Any] = {}
        self.files = self._files()

    def read(self, name: str) -> Tensor:
        file = self.files[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self._directory / file, framework="pt"))
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def _files(self) -> Mapping[str, str]:
        """Tensor name -> file name."""
        if (self._directory / INDEX).is_file():
            weight_map: dict[str, str] = json.loads((self._directory / INDEX).read_text())["weight_map"]
            return weight_map
        if not (self._directory / SINGLE).is_file():
            raise CheckpointError(f"{self._directory} has neither {SINGLE} nor {INDEX}. Check model.path.")
        with safe_open(self._directory / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)


def _check_names(reader: _Reader, wanted: set[str], *, tied: bool) -> None:
    found = set(reader.files)
    missing = sorted(wanted - found)
    if missing:
        raise CheckpointError(f"the safetensors lack {len(missing)} tensor(s) of the model, e.g. {missing[0]}.")
    ignored = {"lm_head.weight"} if tied else set()
    unknown = sorted(name for name in found - wanted - ignored if not name.endswith(_DERIVED))
    if unknown:
        raise CheckpointError(
            f"the safetensors hold {len(unknown)} tensor(s) that config.json has no place for, e.g. {unknown[0]}."
        )


def _agree(learner: Learner, problem: CheckpointError | None) -> None:
    """If one rank failed, all raise: the others would wait for it in the next collective."""
    texts: list[str] = [""] * learner.layout.world_size
    dist.all_gather_object(texts, str(problem or ""))
    if problem is not None:
        raise problem
    failed = next((text for text in texts if text), "")
    if failed:
        raise CheckpointError(failed)
