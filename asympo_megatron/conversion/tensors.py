"""Joining Hugging Face tensors into Megatron parameters and taking them apart again, bit for bit.

Axis suffixes: H hidden (absent for a bias), D head dimension.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

from asympo_megatron.conversion.names import Entry
from asympo_megatron.mcore.hf_config import ModelFacts

AHEAD = 4
"""Tensors made while one is written: large and small ones take turns."""


def split_for_hf(entry: Entry, whole: Tensor, facts: ModelFacts) -> list[tuple[str, Tensor]]:
    """The Hugging Face tensors that a whole Megatron parameter consists of, each contiguous."""
    if entry.join == "qkv":
        parts = _split_qkv(whole, facts)
    elif entry.join == "gate_up":
        parts = whole.chunk(2)
    else:
        parts = (whole,)
    return [(name, part.contiguous()) for name, part in zip(entry.hf, parts, strict=True)]


def join_from_hf(entry: Entry, parts: Sequence[Tensor], facts: ModelFacts) -> Tensor:
    """The whole Megatron parameter from its Hugging Face tensors: the inverse of :func:`split_for_hf`."""
    if entry.join == "qkv":
        return _join_qkv(parts, facts)
    return torch.cat(list(parts)) if entry.join == "gate_up" else parts[0]


def made_ahead(make: Callable[[int], Tensor], count: int) -> Iterator[Tensor]:
    """``make(0)``, ``make(1)`` ... in a thread that is up to ``AHEAD`` tensors ahead of the caller.

    One thread: several that make many small calls would wait for Python's lock most of the time.
    """
    worker, numbers = ThreadPoolExecutor(1), iter(range(count))
    upcoming = deque(worker.submit(make, number) for number in islice(numbers, AHEAD))
    try:
        while upcoming:
            made = upcoming.popleft().result()
            upcoming.extend(worker.submit(make, number) for number in islice(numbers, 1))
            yield made
    finally:
        worker.shutdown(cancel_futures=True)


def hf_shapes(entry: Entry, facts: ModelFacts) -> list[tuple[int, ...]]:
    """Shapes that the config demands of the tensors of ``entry``."""
    hidden, dim = facts.hidden_size, facts.head_dim
    ffn = facts.moe.ffn_size if facts.moe and ".experts." in entry.megatron else facts.ffn_size
    query, key = facts.num_heads * dim, facts.num_kv_heads * dim
    if entry.join == "gate_up":
        return [(ffn, hidden)] * 2
    if entry.join == "qkv":
        tail = (hidden,) if entry.megatron.endswith("weight") else ()
        return [(rows, *tail) for rows in (query, key, key)]
    name = entry.megatron
    if name.endswith("linear_proj.weight"):
        return [(hidden, query)]
    if name.endswith("linear_fc2.weight"):
        return [(hidden, ffn)]
    if name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
        return [(dim,)]
    if facts.moe and name.endswith("router.weight"):
        return [(facts.moe.num_experts, hidden)]
    return [(hidden,)] if "norm" in name else [(facts.vocab_size, hidden)]


def _split_qkv(whole: Tensor, facts: ModelFacts) -> tuple[Tensor, ...]:
    """Rows are ordered group after group: the group's query heads, its key head, its value head."""
    per_group = facts.num_heads // facts.num_kv_heads
    heads = whole.unflatten(0, (facts.num_kv_heads, per_group + 2, facts.head_dim))
    query, key, value = heads.split([per_group, 1, 1], dim=1)
    return tuple(part.flatten(0, 2) for part in (query, key, value))


def _join_qkv(parts: Sequence[Tensor], facts: ModelFacts) -> Tensor:
    groups = [part.unflatten(0, (facts.num_kv_heads, -1, facts.head_dim)) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 2)
