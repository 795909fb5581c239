"""Three global batches that a parity test should not find easy, and how a cell of the lattice cuts them up.

mixed    15 responses (no multiple of any DP size): prompts longer than responses, one-token responses, a fully
         masked response, a group without variance, multi-turn masks
lopsided 5 responses, one of them with 90% of the trained tokens
lonely   3 responses and one trained token: all other data-parallel ranks, context shards and micro-batches have none
"""

import math
import random
from collections.abc import Sequence
from dataclasses import fields, replace

from asympo_megatron.advantages import compute_advantages
from asympo_megatron.mcore import Layout, Row
from asympo_megatron.records import Group, Response

VOCAB = 67
"""Odd on purpose: under tensor parallelism the vocabulary is padded."""

MAX_TOKENS = 4096
"""Budget of a micro-batch: room for a whole global batch on one rank."""

MULTI_TURN = [1] * 3 + [0] * 6 + [1] * 2 + [0] * 4 + [1] * 3


def global_batches(count: int, seed: int = 0) -> list[list[Group]]:
    """The groups of ``count`` steps: mixed, lopsided, lonely, and again with other tokens."""
    makers = (_mixed, _lopsided, _lonely)
    return [makers[step % 3](random.Random(seed * 1000 + step)) for step in range(count)]


def _mixed(rng: random.Random) -> list[Group]:
    return [
        _group(rng, 20, [[1], [1] * 6, [0] * 5, [1] * 3], [1.0, 0.0, 1.0, 0.0]),
        _group(rng, 7, [[1] * 9, [1] * 14, [1]], [1.0, 1.0, 1.0]),
        _group(rng, 3, [MULTI_TURN, [1] * 11, [0, 1] * 4, MULTI_TURN[3:], [1] * 2], [0.0, 1.0, 1.0, 0.0, 0.5]),
        _group(rng, 1, [[1] * 17, [1], [1] * 8], [1.0, 0.0, 0.0]),
    ]


def _lopsided(rng: random.Random) -> list[Group]:
    return [
        _group(rng, 5, [[1] * 100, [1] * 2, [1]], [0.0, 1.0, 1.0]),
        _group(rng, 2, [[1] * 3, [1] * 4], [1.0, 0.0]),
    ]


def _lonely(rng: random.Random) -> list[Group]:
    return [_group(rng, 9, [[0] * 3 + [1] + [0] * 4, [0] * 2, [0] * 6], [1.0, 0.0, 0.0])]


def _group(rng: random.Random, prompt_tokens: int, masks: list[list[int]], rewards: list[float]) -> Group:
    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(count)]

    responses = [
        Response(tokens(len(mask)), mask, reward, behavior_logprobs=_logprobs(rng, len(mask)))
        for mask, reward in zip(masks, rewards, strict=True)
    ]
    return Group(tokens(prompt_tokens), responses)


def _logprobs(rng: random.Random, count: int) -> list[float]:
    """Around those of the untrained model, so that ratios of whole responses are neither 0 nor infinite."""
    return [min(rng.gauss(-math.log(VOCAB), 0.3), 0.0) for _ in range(count)]


LOGPROBS = tuple(field.name for field in fields(Row) if field.name.endswith("_logprobs"))
"""Whatever log-probabilities a row may carry; an objective that needs a new kind finds it here."""


def rows_of(groups: Sequence[Group], seed: int = 0) -> list[Row]:
    """Rows as the trainer makes them: advantages on complete groups, one row a response."""
    rng = random.Random(seed)
    rows = []
    for group in groups:
        advantages = compute_advantages([response.reward for response in group.responses], "group_mean")
        for response, advantage in zip(group.responses, advantages, strict=True):
            row = Row(group.prompt_ids, response.ids, response.mask, advantage)
            logprobs = {name: _logprobs(rng, len(response.ids)) for name in LOGPROBS}
            rows.append(replace(row, **{**logprobs, "behavior_logprobs": response.behavior_logprobs}))
    return rows


def deal(rows: Sequence[Row], microbatches: int, dp_rank: int, dp_size: int) -> list[list[Row]]:
    """This replica's micro-batches. Rows are dealt like cards: no order survives, and some hands are empty."""
    hands: list[list[Row]] = [[] for _ in range(microbatches * dp_size)]
    for number, row in enumerate(rows):
        hands[number % len(hands)].append(row)
    return hands[dp_rank::dp_size]


def rectangle(rows: Sequence[Row], layout: Layout) -> Layout:
    """``layout`` with all sequences of ``rows`` padded to one length: rectangles, as without packing."""
    longest = max(len(row.prompt_ids) + len(row.ids) - 1 for row in rows)
    unit = math.lcm(layout.pad_multiple, layout.pack_multiple)
    return replace(layout, pad_multiple=-(-longest // unit) * unit)
