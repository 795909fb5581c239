"""Responses of one micro-batch -> packed tensors of one rank.

Axis suffixes: T local packed tokens, R responses of the micro-batch, S packed sequences.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asympo_megatron.batch import UNTRAINED, ResponseBatch
from asympo_megatron.errors import BatchError
from asympo_megatron.mcore.layout import Layout
from asympo_megatron.mcore.packed import PackedSequences


@dataclass(frozen=True)
class Row:
    """One response with its prompt, as training needs it.

    Args:
        prompt_ids, ids: token ids of prompt and response.
        mask: 1 where a response token is trained, 0 for tool tokens (everywhere for a masked response).
        advantage: computed on the complete group.
        behavior_logprobs: log mu of ``ids``, or None.
        proximal_logprobs, reference_logprobs: what a scoring pass found for ``ids``, or None.
    """

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    mask: Sequence[int]
    advantage: float
    behavior_logprobs: Sequence[float] | None = None
    proximal_logprobs: Sequence[float] | None = None
    reference_logprobs: Sequence[float] | None = None


LOGPROBS = {
    "behavior_logprobs": "behavior_logprob_T",
    "proximal_logprobs": "proximal_logprob_T",
    "reference_logprobs": "reference_logprob_T",
}
"""Field of a row -> tensor of the ResponseBatch. A tensor exists where every row with trained tokens has the field."""


@dataclass(frozen=True)
class MicroBatch:
    """What the forward pass of one micro-batch reads on this rank.

    Args:
        tokens: int64 [1, T] inputs. targets: int64 [1, T], the next token of each.
        packed: lengths and layouts of the packed sequences.
        responses: ids, advantages and counts, aligned with the targets.
        padding: bool [1, T], True for inputs that only fill up a sequence: routers of experts must not count them.
        real_tokens: input tokens without padding, of all context-parallel ranks together.
    """

    tokens: Tensor
    targets: Tensor
    packed: PackedSequences
    responses: ResponseBatch
    padding: Tensor
    real_tokens: int


def check_rows(rows: Sequence[Row], vocab_size: int, max_tokens: int) -> None:
    """Refuse rows that cannot be trained on.

    Raises:
        BatchError: an empty prompt, a mask of the wrong length, an id outside the vocabulary, or too many tokens.
    """
    for number, row in enumerate(rows):
        if not row.prompt_ids:
            raise BatchError(f"response {number} has an empty prompt: nothing predicts its first token.")
        if len(row.mask) != len(row.ids):
            raise BatchError(f"response {number} has {len(row.mask)} mask entries for {len(row.ids)} tokens.")
        for ids in (row.prompt_ids, row.ids):
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                bad = next(token for token in ids if not 0 <= token < vocab_size)
                raise BatchError(
                    f"response {number} holds token id {bad}, but the model's vocab_size is {vocab_size}. "
                    "Sample with the tokenizer of this model."
                )
        if len(row.prompt_ids) + len(row.ids) > max_tokens:
            raise BatchError(
                f"response {number} has {len(row.prompt_ids)} + {len(row.ids)} tokens; "
                f"batch.max_tokens_per_microbatch is {max_tokens}. Raise it, or limit rollout.sampling."
            )


def collate(rows: Sequence[Row], layout: Layout) -> MicroBatch:
    """Pack the responses of a micro-batch and keep this rank's share.

    The label shift happens here, once, on whole sequences: position t of a sequence scores token t + 1, so the first
    response token is scored at the last prompt position. Only then are sequences split over context parallelism.
    A response without a trained token travels as a row (it counts in N) and costs no compute; nor do the tokens
    behind the last trained one. Without any trained token, a dummy sequence keeps every collective in step.
    """
    tokens, targets, response_ids, fill = [], [], [], []
    lengths: list[int] = []
    trained_rows = [row for row in rows if any(row.mask)]
    logprobs: dict[str, list[float]] = {
        field: [] for field in LOGPROBS if all(getattr(row, field) is not None for row in trained_rows)
    }
    padded, last = 0, max((number for number, row in enumerate(rows) if any(row.mask)), default=-1)
    for number, row in enumerate(rows):
        used = _used_tokens(row)
        if used == 0:
            continue
        sequence = [*row.prompt_ids, *row.ids[:used]]
        size = len(sequence) - 1
        padding = -size % layout.pad_multiple
        if number == last:  # only the whole pack must split evenly under sequence parallelism
            padding += -(sum(lengths) + size + padding) % layout.pack_multiple
        silent = len(row.prompt_ids) - 1
        tokens += sequence[:-1] + [0] * padding
        targets += sequence[1:] + [0] * padding
        trained = [number if bit else UNTRAINED for bit in row.mask[:used]]
        response_ids += [UNTRAINED] * silent + trained + [UNTRAINED] * padding
        fill += [0] * size + [1] * padding
        lengths.append(size + padding)
        padded += padding
        for field, values in logprobs.items():
            values += [0.0] * silent + list(getattr(row, field)[:used]) + [0.0] * padding
    real_tokens = sum(lengths) - padded
    if not lengths:
        size = math.lcm(layout.pad_multiple, layout.pack_multiple)
        lengths = [size]
        tokens = targets = [0] * size
        response_ids = [UNTRAINED] * size
        fill = [1] * size
        logprobs = {field: [0.0] * size for field in LOGPROBS}
    groups, device = layout.groups, layout.device
    packed = PackedSequences.of(lengths, device, groups.context_size, groups.context_rank)
    index = packed.index_of(groups.context_rank) if groups.context_size > 1 else None

    def local(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        whole = torch.tensor(values, dtype=dtype).to(device)
        return whole if index is None else whole[index]

    responses = ResponseBatch(
        response_ids_T=local(response_ids, torch.int64),
        advantage_R=torch.tensor([row.advantage for row in rows], dtype=torch.float32).to(device),
        token_count_R=torch.tensor([sum(row.mask) for row in rows], dtype=torch.int64).to(device),
        **{LOGPROBS[field]: local(values, torch.float32) for field, values in logprobs.items()},  # type: ignore[arg-type]
    )
    inputs, labels = local(tokens, torch.int64)[None], local(targets, torch.int64)[None]
    return MicroBatch(inputs, labels, packed, responses, local(fill, torch.bool)[None], real_tokens)


def scored_spans(rows: Sequence[Row], pad_multiple: int) -> Iterator[tuple[int, int, int]]:
    """Where :func:`collate` puts what is scored: (row, position of its first response token, tokens) in the pack of
    whole sequences, for every row with trained tokens."""
    start = 0
    for number, row in enumerate(rows):
        used = _used_tokens(row)
        if used:
            yield number, start + len(row.prompt_ids) - 1, used
            size = len(row.prompt_ids) + used - 1
            start += size + -size % pad_multiple


def _used_tokens(row: Row) -> int:
    """Response tokens up to the last trained one."""
    return next((size for size in range(len(row.mask), 0, -1) if row.mask[size - 1]), 0)
