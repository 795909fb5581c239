"""Next tokens of a batch, all rows at once.

Axis suffixes: B rows, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from asympo_megatron.engine.params import SamplingParams
from asympo_megatron.engine.sequence import LogprobEntry, Sequence
from asympo_megatron.errors import EngineError

# Below this a temperature means the most likely token, as on the real server.
GREEDY_BELOW = 1e-6
_SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK64 = (1 << 64) - 1


class Sampler:
    """Sampling parameters of the rows of a batch as tensors; rebuilt when rows join or leave."""

    def __init__(self, rows: Rows[Sequence], generator: torch.Generator) -> None:
        params = [row.params for row in rows]
        self._rows = rows
        self._generator = generator
        temperatures = [1.0 if param.temperature < GREEDY_BELOW else param.temperature for param in params]
        greedy = [param.temperature < GREEDY_BELOW for param in params]
        self._all_greedy, self._any_greedy = all(greedy), any(greedy)
        self._greedy_B = torch.tensor(greedy)
        self._temperature_B1 = torch.tensor(temperatures).unsqueeze(1)
        self._scaled = any(value != 1.0 for value in temperatures)
        self._truncated = any(param.top_p < 1 or param.top_k > 0 or param.min_p > 0 for param in params)
        if self._truncated:
            self._top_p_B1 = torch.tensor([param.top_p for param in params]).unsqueeze(1)
            self._top_k_B1 = torch.tensor([param.top_k if param.top_k > 0 else 1 << 40 for param in params]).unsqueeze(
                1
            )
            self._min_p_B1 = torch.tensor([param.min_p for param in params]).unsqueeze(1)
        self._penalized = [row for row, param in enumerate(params) if _is_penalized(param)]
        self._seeded = [row for row, param in enumerate(params) if param.sampling_seed is not None]
        self.return_logprob = any(row.return_logprob for row in rows)

    def sample(self, logits_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw one token a row.

        Args:
            logits_BV: fp32 [B, V]; changed in place where penalties apply.

        Returns:
            Tokens int64 [B], and log softmax(logits / temperature) fp32 [B, V] before truncation (None if no row asks).

        Raises:
            EngineError: logits that are not finite.
        """
        if not torch.isfinite(logits_BV).all():
            raise EngineError("the model's logits are not finite: its weights are damaged. Publish sound weights.")
        for number in self._penalized:
            _penalize(logits_BV[number], self._rows[number])
        scaled_BV = logits_BV / self._temperature_B1 if self._scaled else logits_BV
        logprob_BV = torch.log_softmax(scaled_BV, -1) if self.return_logprob else None
        if self._all_greedy:
            return logits_BV.argmax(-1), logprob_BV
        probability_BV = torch.softmax(scaled_BV, -1)
        if self._truncated:
            probability_BV = self._truncate(probability_BV)
        # Inverse transform in float64: an fp32 running sum would lose the tail of a large vocabulary.
        cumulative_BV = probability_BV.cumsum(-1, dtype=torch.float64)
        target_B1 = self._uniforms().unsqueeze(1) * cumulative_BV[:, -1:]
        token_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)
        token_B.clamp_max_(logits_BV.shape[-1] - 1)
        if self._any_greedy:
            token_B = torch.where(self._greedy_B, logits_BV.argmax(-1), token_B)
        return token_B, logprob_BV

    def _truncate(self, probability_BV: Tensor) -> Tensor:
        """Zero what top_k, top_p and min_p leave out; the rest is not normalised."""
        sorted_BV, order_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(sorted_BV.shape[-1])
        dropped_BV = rank_V >= self._top_k_B1
        # A token stays while the mass before it is within top_p, so the first one always does.
        dropped_BV |= sorted_BV.cumsum(-1) - sorted_BV > self._top_p_B1
        dropped_BV |= sorted_BV < sorted_BV[:, :1] * self._min_p_B1
        return torch.zeros_like(probability_BV).scatter_(-1, order_BV, sorted_BV.masked_fill_(dropped_BV, 0.0))

    def _uniforms(self) -> Tensor:
        """One number in [0, 1) a row: from the row's seed and position where it has a seed, else from the engine."""
        uniform_B = torch.rand(len(self._rows), dtype=torch.float64, generator=self._generator)
        for number in self._seeded:
            row = self._rows[number]
            uniform_B[number] = seeded_uniform(row.params.sampling_seed or 0, len(row.output_ids))
        return uniform_B


def seeded_uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from seed and position alone (splitmix64), whatever else is in the batch."""
    step, first, second = _SPLITMIX
    state = ((seed & _MASK64) * first + (position + 1) * step) & _MASK64
    state = ((state ^ (state >> 30)) * first) & _MASK64
    state = ((state ^ (state >> 27)) * second) & _MASK64
    return ((state ^ (state >> 31)) >> 11) * 2.0**-53


def top_entries(logprob_V: Tensor, count: int) -> list[LogprobEntry]:
    """The ``count`` most likely tokens as (log-prob, token, None)."""
    values, tokens = logprob_V.topk(count)
    return [(value, token, None) for value, token in zip(values.tolist(), tokens.tolist(), strict=True)]


def _is_penalized(params: SamplingParams) -> bool:
    return bool(
        params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1 or params.min_new_tokens
    )


def _penalize(logits_V: Tensor, row: Sequence) -> None:
    params = row.params
    if row.output_ids and (params.frequency_penalty or params.presence_penalty):
        counts = Counter(row.output_ids)
        count_S = torch.tensor(list(counts.values()))
        logits_V[torch.tensor(list(counts))] -= params.frequency_penalty * count_S + params.presence_penalty
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.context_ids())))
        values = logits_V[seen]
        factor = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / factor, values * factor)
    if len(row.output_ids) < params.min_new_tokens and row.stop_ids:
        logits_V[torch.tensor(sorted(row.stop_ids))] = -torch.inf
