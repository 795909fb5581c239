"""Hugging Face safetensors -> Megatron-Core: every rank reads what it holds, whatever the layout."""

from pathlib import Path

import torch
import torch.distributed as dist

from asympo_megatron.conversion.hf_files import HFFiles
from asympo_megatron.conversion.names import entries
from asympo_megatron.conversion.tensors import hf_shapes, join_from_hf
from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore import Learner


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
    _agree(learner, problem)
    learner.weights_changed()


@torch.no_grad()
def _load(learner: Learner, directory: Path) -> None:
    own = list(learner.shards())  # collective where parameters are gathered late: before anything can fail on one rank
    facts = learner.plan.facts
    files = HFFiles(directory)
    table = list(entries(facts))
    files.check_names((name for entry in table for name in entry.hf), tied=facts.tied)
    by_name = {entry.megatron: entry for entry in table}
    for shard in own:
        entry = by_name["embedding.word_embeddings.weight" if shard.is_copy else shard.name]
        shapes = hf_shapes(entry, facts)
        parts = [files.read(name, shape) for name, shape in zip(entry.hf, shapes, strict=True)]
        shard.param.copy_(shard.take(join_from_hf(entry, parts, facts)))


def _agree(learner: Learner, problem: CheckpointError | None) -> None:
    """If one rank failed, all raise: the others would wait for it in the next collective."""
    texts: list[str] = [""] * learner.layout.world_size
    dist.all_gather_object(texts, str(problem or ""))
    if problem is not None:
        raise problem
    failed = next((text for text in texts if text), "")
    if failed:
        raise CheckpointError(failed)
