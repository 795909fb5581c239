"""Responses to packed tensors: the label shift, masks, padding, and rows that cost nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from asympo_megatron.errors import BatchError
from asympo_megatron.mcore.collate import Row, check_rows, collate
from asympo_megatron.mcore.layout import Layout
from asympo_megatron.parallel import ParallelGroups

LAYOUT = Layout(
    groups=ParallelGroups.single(),
    rank=0,
    world_size=1,
    dp_rank=0,
    dp_size=1,
    pad_multiple=1,
    device=torch.device("cpu"),
)

ROWS = [
    Row([10, 11, 12], [20, 21, 22], [1, 0, 1], 0.5, [-0.1, -0.2, -0.3]),
    Row([13], [23], [0], -1.0, [-0.4]),
    Row([14], [24, 25, 26], [1, 1, 0], 2.0, [-0.5, -0.6, -0.7]),
]


def test_first_response_token_is_scored_at_the_last_prompt_position() -> None:
    batch = collate(ROWS, LAYOUT)
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, 14, 24]]
    assert batch.targets.tolist() == [[11, 12, 20, 21, 22, 24, 25]]
    assert batch.responses.response_ids_T.tolist() == [-1, -1, 0, -1, 0, 2, 2]
    assert batch.packed.cu_seqlens_q.tolist() == [0, 5, 7]


def test_untrained_responses_travel_as_rows_and_untrained_tails_not_at_all() -> None:
    batch = collate(ROWS, LAYOUT)
    assert batch.responses.advantage_R.tolist() == [0.5, -1.0, 2.0]
    assert batch.responses.token_count_R.tolist() == [2, 0, 2]
    assert batch.real_tokens == 7  # nothing of row 1, and not the tool token that ends row 2


def test_behavior_logprobs_are_aligned_with_the_targets() -> None:
    got = collate(ROWS, LAYOUT).responses.behavior_logprob_T
    assert got is not None
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, -0.1, -0.2, -0.3, -0.5, -0.6]))
    without = [*ROWS[:2], replace(ROWS[2], behavior_logprobs=None)]
    assert collate(without, LAYOUT).responses.behavior_logprob_T is None


def test_padding_carries_no_response() -> None:
    batch = collate(ROWS, replace(LAYOUT, pad_multiple=4))
    assert batch.packed.lengths_S == (8, 4)
    assert batch.responses.response_ids_T.tolist() == [-1, -1, 0, -1, 0, -1, -1, -1, 2, 2, -1, -1]
    assert batch.real_tokens == 7


def test_the_pack_is_padded_at_its_end_only() -> None:
    """Sequence parallelism wants equal shards of the pack, not of every sequence. The last trained row takes it."""
    batch = collate([ROWS[0], ROWS[2], ROWS[1]], replace(LAYOUT, pad_multiple=2, pack_multiple=6))
    assert batch.packed.lengths_S == (6, 6)
    assert batch.responses.response_ids_T.tolist() == [-1, -1, 0, -1, 0, -1, 1, 1, -1, -1, -1, -1]
    assert batch.padding.tolist() == [[False] * 5 + [True, False, False, True, True, True, True]]
    assert batch.real_tokens == 7
    assert collate([], replace(LAYOUT, pad_multiple=2, pack_multiple=6)).packed.lengths_S == (6,)


@pytest.mark.parametrize("rows", [[], [ROWS[1]]], ids=["no rows", "no trained token"])
def test_dummy_sequence_keeps_collectives_in_step(rows: list[Row]) -> None:
    batch = collate(rows, replace(LAYOUT, pad_multiple=4))
    assert batch.tokens.shape == (1, 4)
    assert batch.responses.response_ids_T.tolist() == [-1] * 4
    assert batch.responses.num_responses == len(rows)
    assert batch.real_tokens == 0


class _Rank:
    """A context-parallel group of two, as seen by one rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return self._rank


def test_label_shift_comes_before_the_split() -> None:
    """Every (token, target, response) of the whole pack is on exactly one rank: no pair is cut at a chunk border."""
    whole = collate(ROWS, replace(LAYOUT, pad_multiple=4))
    pairs = []
    for rank in (0, 1):
        group: Any = _Rank(rank)
        part = collate(ROWS, replace(LAYOUT, pad_multiple=4, groups=ParallelGroups(context=group)))
        assert part.tokens.shape == (1, 6)
        assert part.responses.token_count_R.tolist() == [2, 0, 2]  # of the whole response
        pairs += _triples(part)
    assert sorted(pairs) == sorted(_triples(whole))


def _triples(batch: Any) -> list[tuple[int, int, int]]:
    ids = batch.responses.response_ids_T.tolist()
    return list(zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), ids, strict=True))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([], [1], [1], 0.0), "response 0 has an empty prompt"),
        (Row([1], [1, 2], [1], 0.0), "1 mask entries for 2 tokens"),
        (Row([1], [30], [1], 0.0), "token id 30, but the model's vocab_size is 30"),
        (Row([-1], [3], [1], 0.0), "token id -1"),
        (Row([1, 2, 3], [1] * 6, [1] * 6, 0.0), r"3 \+ 6 tokens; batch.max_tokens_per_microbatch is 8"),
    ],
)
def test_refusals(row: Row, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        check_rows([row], vocab_size=30, max_tokens=8)
    check_rows([Row([1, 2], [29] * 6, [1] * 6, 0.0)], vocab_size=30, max_tokens=8)
