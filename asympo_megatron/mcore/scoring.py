"""The scoring pass: log-probs of recorded tokens under the weights in the model, forward only.

rows -> collate, as for training -> Megatron's schedule -> [L] per micro-batch on the last pipeline stage
     -> zigzag undone over CP -> sent to the other stages -> rows that carry their log-probs

Axis suffixes: T tokens of all context-parallel ranks in packed order, L those of one rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import tee
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from asympo_megatron.mcore.collate import MicroBatch, Row, collate, scored_spans
from asympo_megatron.mcore.layout import Layout
from asympo_megatron.mcore.loss import run_model
from asympo_megatron.parallel import ParallelGroups, merge_context

PASSES: Mapping[str, str] = MappingProxyType(
    {"old": "proximal_logprobs", "proximal": "proximal_logprobs", "reference": "reference_logprobs"}
)
"""What can be scored -> the field of a row that receives it. ``old`` and ``proximal`` are two names of one thing: the
policy at the moment of the pass."""


def score_rows(
    chunks: Sequence[Any], microbatches: Sequence[Sequence[Row]], field: str, layout: Layout, seq_length: int
) -> list[list[Row]]:
    """Collective: the rows with ``field`` filled by the weights that ``chunks`` hold, on every rank of the replica.

    Args:
        chunks: model chunks of this rank.
        microbatches: as many as the schedule demands, equal on every rank of the replica.
        field: ``proximal_logprobs`` or ``reference_logprobs``.
        layout: of this rank.
        seq_length: for the schedule; sequences are packed and of any length.

    Returns:
        One log-prob for each of a row's ``ids``, at the sampling temperature; 0 behind the last trained token, which
        is never computed, and throughout rows without one.
    """
    batches = [collate(rows, layout) for rows in microbatches]
    local_L = _forward(chunks, batches, seq_length)
    sizes = [int(batch.tokens.shape[1]) * layout.groups.context_size for batch in batches]
    if local_L:
        whole_T = _merge(torch.cat(local_L), batches, layout.groups)
    else:
        whole_T = torch.empty(sum(sizes), device=layout.device)
    pipeline = layout.groups.pipeline
    if pipeline is not None:
        dist.broadcast(whole_T, src=dist.get_process_group_ranks(pipeline)[-1], group=pipeline)
    scored = whole_T.cpu().split(sizes)
    return [
        _fill(rows, part_T.tolist(), field, layout.pad_multiple)
        for rows, part_T in zip(microbatches, scored, strict=True)
    ]


def with_statistics(objective: Any, batches: list[MicroBatch], groups: ParallelGroups) -> list[MicroBatch]:
    """Collective: the micro-batches with what ``objective`` wants to know about the whole global batch."""
    survey: Callable[..., Mapping[str, Tensor]] | None = getattr(objective, "statistics", None)
    found = survey([batch.responses for batch in batches], groups) if survey else {}
    if not found:
        return batches
    return [replace(batch, responses=replace(batch.responses, statistics=found)) for batch in batches]


def _forward(chunks: Sequence[Any], batches: list[MicroBatch], seq_length: int) -> list[Tensor]:
    """Log-probs [L] of each micro-batch on the last pipeline stage, nothing on the others."""
    iterators = list(tee(iter(batches), len(chunks)))
    single = len(chunks) == 1
    with torch.no_grad(), _evaluating(chunks):
        scored: list[Tensor] = get_forward_backward_func()(
            forward_step_func=_score_step,
            data_iterator=iterators[0] if single else iterators,
            model=chunks[0] if single else list(chunks),
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return scored


def _score_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Tensor]]:
    """``forward_step_func`` of the schedules; ``collect_non_loss_data`` hands out what the callback returns."""
    output = run_model(next(batches), model)
    return output, lambda nll_and_entropy_2L, **_: -nll_and_entropy_2L[0]


@contextmanager
def _evaluating(chunks: Sequence[Any]) -> Iterator[None]:
    """Without recomputation and router losses, which exist for the backward pass."""
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train()


def _merge(local_L: Tensor, batches: Sequence[MicroBatch], groups: ParallelGroups) -> Tensor:
    """All micro-batches one after another in the order of whole sequences: one all-gather over context parallelism."""
    if groups.context is None:
        return local_L
    ranks = [torch.empty_like(local_L) for _ in range(groups.context_size)]
    dist.all_gather(ranks, local_L, group=groups.context)
    sizes = [int(batch.tokens.shape[1]) for batch in batches]
    parts = zip(batches, *(rank_L.split(sizes) for rank_L in ranks), strict=True)
    return torch.cat([merge_context(list(local), batch.packed.cu_seqlens_q) for batch, *local in parts])


def _fill(rows: Sequence[Row], scored: Sequence[float], field: str, pad_multiple: int) -> list[Row]:
    values = [[0.0] * len(row.ids) for row in rows]
    for number, start, used in scored_spans(rows, pad_multiple):
        values[number][:used] = scored[start : start + used]
    return [replace(row, **{field: found}) for row, found in zip(rows, values, strict=True)]  # type: ignore[arg-type]
