"""`asympo doctor MODEL`: what would run for a model and a layout, and the memory of its states per rank."""

import math
from collections.abc import Mapping
from typing import Any

from asympo_megatron.config import Config
from asympo_megatron.conversion.names import Entry, entries
from asympo_megatron.conversion.tensors import hf_shapes
from asympo_megatron.mcore.hf_config import ModelFacts
from asympo_megatron.mcore.model_config import plan_model
from asympo_megatron.mcore.spec import uses_transformer_engine

_GIB = 2**30


def describe_model(config: Config, hf_config: Mapping[str, Any]) -> str:
    """Layers, attention, parameters and bytes per rank, one a line.

    Raises:
        ConfigError, UnknownNameError: the model is not supported, or the layout cannot hold it.
    """
    plan = plan_model(config, hf_config)
    facts, parallel = plan.facts, config.parallel
    engine = uses_transformer_engine()
    total = sum(_size(entry, facts) for entry in entries(facts))
    stage, held = _largest_stage(config, facts)
    lines = [
        f"model: {facts.model_type}, {facts.num_layers} layers of {facts.hidden_size}, {total / 1e9:.3f} B parameters, "
        f"vocabulary {facts.vocab_size} padded to {plan.padded_vocab_size}",
        "layers: " + ("Transformer Engine" if engine else "Megatron's local spec with our RMSNorm"),
        "attention: "
        + ("TEDotProductAttention, packed thd" if engine else "PyTorch SDPA per packed sequence")
        + (f", zigzag over CP {parallel.context}" if parallel.context > 1 else ""),
        f"layout: TP {parallel.tensor} x PP {parallel.pipeline} x CP {parallel.context}, EP {parallel.expert}; "
        f"largest stage ({stage}) holds {held / 1e9:.3f} B parameters a rank",
        *_states(config, held),
        "activations come on top: lower batch.max_tokens_per_microbatch, or set model.megatron.recompute_granularity",
    ]
    return "\n".join(lines)


def _states(config: Config, held: int) -> list[str]:
    """Weights and what the optimizer keeps. Gradients are float32: each response adds to them."""
    weight = 4 if config.model.dtype == "fp32" else 2
    master = 0 if config.model.dtype == "fp32" else 4
    fixed, sharded = held * (weight + 4) / _GIB, held * (master + 8) / _GIB
    text = f"memory a rank: weights and float32 gradients {fixed:.2f} GiB"
    if config.optimizer.distributed:
        return [f"{text}, plus optimizer states {sharded:.2f} GiB divided by the data-parallel size"]
    return [f"{text}, optimizer states {sharded:.2f} GiB (optimizer.distributed=true divides them by DP)"]


def _largest_stage(config: Config, facts: ModelFacts) -> tuple[str, int]:
    """Which pipeline stage holds most, and how many parameters one of its ranks has."""
    stages = config.parallel.pipeline
    rows = list(entries(facts))
    layers = sum(_rank_size(entry, config, facts) for entry in rows if entry.megatron.startswith("decoder.layers."))
    rest = {entry.megatron: _rank_size(entry, config, facts) for entry in rows if ".layers." not in entry.megatron}
    embedding = rest.pop("embedding.word_embeddings.weight")
    last = sum(rest.values()) + (embedding if facts.tied and stages > 1 else 0)  # a tied output weight is a copy there
    if stages == 1:
        return "the only one", layers + embedding + last
    name, extra = max(("first", embedding), ("last", last), key=lambda stage: stage[1])
    return name, math.ceil(layers / stages) + extra


def _rank_size(entry: Entry, config: Config, facts: ModelFacts) -> int:
    size = _size(entry, facts)
    parallel = config.parallel
    if "norm" in entry.megatron or "router" in entry.megatron:
        return size  # replicated
    if ".experts." in entry.megatron:
        return math.ceil(size / (parallel.expert * parallel.expert_tensor_size))
    return math.ceil(size / parallel.tensor)


def _size(entry: Entry, facts: ModelFacts) -> int:
    return sum(math.prod(shape) for shape in hf_shapes(entry, facts))
