"""The rows that decode together: prefill, one decode step, joining and leaving.

Axis suffixes: B rows, L columns, V vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from asympo_megatron.engine.kv_cache import BatchCache, left_padded
from asympo_megatron.engine.model import ServedModel
from asympo_megatron.engine.sampler import Sampler, top_entries
from asympo_megatron.engine.sequence import Sequence

MAX_PREFILL_TOKENS = 16_384
"""Tokens of one prefill forward, padding included."""


class DecodeBatch:
    """Running sequences and their cache. All methods belong to the model thread, under inference mode."""

    def __init__(self, model: ServedModel, generator: torch.Generator) -> None:
        self.rows: list[Sequence] = []
        self._model = model
        self._generator = generator
        self.clear()

    def clear(self) -> None:
        """Forget all rows and their keys and values."""
        self.rows = []
        self._cache: BatchCache | None = None
        self._last_B = torch.empty(0, dtype=torch.int64)
        self._mask_BL = torch.empty(0, 0, dtype=torch.int64)
        self._sampler: Sampler | None = None

    @property
    def cached_tokens(self) -> int:
        """Columns held for all rows, padding included."""
        return self._mask_BL.numel()

    def prefill(self, rows: list[Sequence]) -> None:
        """Read the contexts of ``rows`` and sample one token each. They join even when that token finishes them.

        Rows with the same context, as the responses of a group start out, are read once.
        """
        for row in rows:
            if row.wants_input_logprobs and not row.input_logprobs:
                _score_prompt(self._model, row)
        contexts = [row.context_ids() for row in rows]
        unique: dict[tuple[int, ...], int] = {}
        source = torch.tensor([unique.setdefault(tuple(context), len(unique)) for context in contexts])
        ids_UL, mask_UL, position_UL = left_padded([list(context) for context in unique], fill=0)
        cache = BatchCache(self._model.num_layers)
        logits_UV = self._forward(ids_UL, mask_UL, position_UL, cache)
        repeated = len(unique) < len(rows)
        mask_BL = mask_UL[source] if repeated else mask_UL
        last_B = self._sample(rows, Sampler(rows, self._generator), logits_UV[source] if repeated else logits_UV)
        self._join(rows, cache, source if repeated else None, mask_BL, last_B)

    def decode(self) -> None:
        """Feed every row its last token and sample the next."""
        assert self._cache is not None
        if self._sampler is None:
            self._sampler = Sampler(self.rows, self._generator)
        self._mask_BL = torch.nn.functional.pad(self._mask_BL, (0, 1), value=1)
        position_B1 = self._mask_BL.sum(1, keepdim=True) - 1
        logits_BV = self._forward(self._last_B.unsqueeze(1), self._mask_BL, position_B1, self._cache)
        self._last_B = self._sample(self.rows, self._sampler, logits_BV)

    def drop(self, leaving: Iterable[Sequence]) -> None:
        """Remove rows; columns that only they needed go with them."""
        gone = set(map(id, leaving))
        kept = [number for number, row in enumerate(self.rows) if id(row) not in gone]
        if len(kept) == len(self.rows):
            return
        if not kept or self._cache is None:
            self.clear()
            return
        index = torch.tensor(kept)
        mask_BL = self._mask_BL[index]
        length = int(mask_BL.sum(1).max())
        self._cache = BatchCache.assembled([(self._cache, index)], length)
        self._mask_BL = mask_BL[:, mask_BL.shape[1] - length :]
        self._last_B = self._last_B[index]
        self.rows = [self.rows[number] for number in kept]
        self._sampler = None

    def _join(
        self, rows: list[Sequence], cache: BatchCache, source: Tensor | None, mask_BL: Tensor, last_B: Tensor
    ) -> None:
        parts: list[tuple[BatchCache, Tensor | None]] = [(cache, source)]
        masks = [mask_BL]
        if self._cache is not None:
            parts.insert(0, (self._cache, None))
            masks.insert(0, self._mask_BL)
        length = max(mask.shape[1] for mask in masks)
        if len(parts) > 1 or source is not None:
            cache = BatchCache.assembled(parts, length)
        self._cache = cache
        pad = torch.nn.functional.pad
        self._mask_BL = torch.cat([pad(mask, (length - mask.shape[1], 0)) for mask in masks])
        self._last_B = torch.cat([self._last_B, last_B])
        self.rows = self.rows + rows
        self._sampler = None

    def _forward(self, ids_BL: Tensor, mask_BL: Tensor, position_BL: Tensor, cache: BatchCache) -> Tensor:
        output = self._model.module(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            position_ids=position_BL,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _sample(self, rows: list[Sequence], sampler: Sampler, logits_BV: Tensor) -> Tensor:
        token_B, logprob_BV = sampler.sample(logits_BV)
        tokens = token_B.tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.output_ids.append(token)
        if logprob_BV is not None:
            chosen = logprob_BV.gather(1, token_B.unsqueeze(1)).squeeze(1).tolist()
            for number, row in enumerate(rows):
                if row.return_logprob:
                    row.logprobs.append(chosen[number])
                    if row.top_logprobs_num:
                        row.top_logprobs.append(top_entries(logprob_BV[number], row.top_logprobs_num))
        return token_B


def prefill_groups(rows: list[Sequence]) -> list[list[Sequence]]:
    """Split rows into prefills of similar lengths, so that padding stays small, and of bounded size."""
    groups: list[list[Sequence]] = []
    shortest = 0
    for row in sorted(rows, key=lambda row: len(row.context_ids())):
        length = len(row.context_ids())
        fits = groups and (len(groups[-1]) + 1) * length <= MAX_PREFILL_TOKENS and length <= 2 * shortest
        if not fits:
            groups.append([])
            shortest = length
        groups[-1].append(row)
    return groups


def _score_prompt(model: ServedModel, row: Sequence) -> None:
    """Log-probs of the prompt's own tokens, at temperature 1, by a forward of its own."""
    ids = torch.tensor([row.prompt_ids])
    logprob_LV = torch.log_softmax(model.module(input_ids=ids, use_cache=False).logits[0].float(), -1)
    for position in range(row.logprob_start_len, len(row.prompt_ids)):
        token = row.prompt_ids[position]
        value = float(logprob_LV[position - 1, token]) if position else None
        row.input_logprobs.append((value, token, None))
        if row.top_logprobs_num:
            row.input_top_logprobs.append(
                top_entries(logprob_LV[position - 1], row.top_logprobs_num) if position else None
            )
