"""The data of the lattice is as awkward as it claims, and every row is dealt exactly once."""

import torch
from lattice_cells import LAYOUTS, MICROBATCHES
from lattice_data import deal, global_batches, rectangle, rows_of

from asympo_megatron.mcore import Layout
from asympo_megatron.mcore.collate import collate
from asympo_megatron.parallel import SINGLE, ParallelGroups

MIXED, LOPSIDED, LONELY = global_batches(3)


def _layout(pad_multiple: int = 1, groups: ParallelGroups = SINGLE) -> Layout:
    return Layout(groups, 0, 1, 0, 1, pad_multiple, torch.device("cpu"))


def test_mixed_batch() -> None:
    rows = rows_of(MIXED)
    assert all(len(rows) % size for size in (2, 4, 8))
    assert any(len(row.prompt_ids) > len(row.ids) for row in rows)
    assert any(row.mask == [1] for row in rows)
    assert any(not any(row.mask) for row in rows)
    assert any(len({response.reward for response in group.responses}) == 1 for group in MIXED)
    # multi-turn: a trained token, then untrained ones, then a trained one again
    assert any("1" in "".join(map(str, row.mask)).strip("1").strip("0") for row in rows if any(row.mask))


def test_lopsided_batch() -> None:
    sizes = [sum(row.mask) for row in rows_of(LOPSIDED)]
    assert max(sizes) >= 0.9 * sum(sizes)


def test_lonely_batch() -> None:
    rows = rows_of(LONELY)
    assert sum(sum(row.mask) for row in rows) == 1
    trained = [row for row in rows if any(row.mask)]
    assert trained[0].advantage != 0
    for size in (2, 4):
        batches = [microbatch for rank in range(1, size) for microbatch in deal(rows, 1, rank, size)]
        assert not any(any(row.mask) for microbatch in batches for row in microbatch)


def test_every_batch_is_new() -> None:
    six = global_batches(6)
    assert len({group.prompt_ids[0] * 1000 + len(group.prompt_ids) for groups in six for group in groups}) > 10
    assert six[0] != six[3]
    assert global_batches(6) == six


def test_every_row_is_dealt_once() -> None:
    rows = rows_of(MIXED)
    for dp_size in {shape.ranks for shape in LAYOUTS.values()} | {1, 8}:
        for count in MICROBATCHES:
            hands = [deal(rows, count, rank, dp_size) for rank in range(dp_size)]
            assert all(len(hand) == count for hand in hands)
            dealt = [id(row) for hand in hands for microbatch in hand for row in microbatch]
            assert sorted(dealt) == sorted(map(id, rows))


def test_padded_micro_batches_are_rectangles() -> None:
    rows = rows_of(MIXED)
    layout = _layout(pad_multiple=4)
    packed, padded = collate(rows, layout), collate(rows, rectangle(rows, layout))
    assert len(set(packed.packed.lengths_S)) > 3
    assert len(set(padded.packed.lengths_S)) == 1
    assert padded.packed.lengths_S[0] % 4 == 0
    assert packed.real_tokens == padded.real_tokens < padded.tokens.numel() / 1.5
