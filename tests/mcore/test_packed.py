"""Packed sequences: positions, padded layouts and attention against plain loops over the sequences."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from asympo_megatron.errors import ConfigError
from asympo_megatron.mcore.attention import SHORT, PackedAttention
from asympo_megatron.mcore.packed import PackedSequences

CPU = torch.device("cpu")
LENGTHS = [
    pytest.param([5, 5, 5], id="equal"),
    pytest.param([7, 1, 26, 24, 3, 25], id="uneven"),
    pytest.param([1], id="one token"),
    pytest.param([70, 3, 65, 80], id="long and short"),
    pytest.param([3000, 3, 2999], id="too large for one batch"),
]


def _attention(dropout: float = 0.0) -> PackedAttention:
    config = SimpleNamespace(attention_dropout=dropout, kv_channels=8)
    return PackedAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=None))


def _loop(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Softmax attention written out, one sequence and one head at a time."""
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        heads = []
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = q[:, head] @ k[:, group].T / 8**0.5
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, group])
        outputs.append(torch.cat(heads, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", LENGTHS[:4])
def test_attention_equals_the_loop(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(sum(lengths), 32, generator=generator, dtype=torch.float64)
    packed = PackedSequences.of(lengths, CPU)
    got = _attention()(*inputs, None, packed_seq_params=packed)
    wanted = _loop(*inputs, lengths)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    got_grads = torch.autograd.grad((got * weight).sum(), inputs)
    for a, b in zip(got_grads, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_token_has_a_slot_of_its_own(lengths: list[int]) -> None:
    packed = PackedSequences.of(lengths, CPU)
    layout = packed.query_layout
    slots = torch.arange(sum(lengths)) if layout.slot_T is None else layout.slot_T
    assert len(set(slots.tolist())) == sum(lengths)
    # The slot says row and position: a bucket's rows are as long as its longest sequence.
    starts = [0]
    for bucket in layout.buckets:
        starts.append(starts[-1] + bucket.slots)
    assert layout.num_slots == starts[-1]
    for slot, position in zip(slots.tolist(), packed.positions.tolist(), strict=True):
        number = max(i for i, start in enumerate(starts[:-1]) if start <= slot)
        assert (slot - starts[number]) % layout.buckets[number].length == position


def test_similar_lengths_share_a_call_and_equal_ones_stay_in_place() -> None:
    assert PackedSequences.of([6, 6, 6], CPU).query_layout.slot_T is None
    assert len(PackedSequences.of([26, 25, 24, 23, 22, 21, 20], CPU).query_layout.buckets) == 1
    assert [b.rows for b in PackedSequences.of([100, 99, 10, 9], CPU).query_layout.buckets] == [2, 2]


def test_positions_restart_in_every_sequence() -> None:
    assert PackedSequences.of([3, 1, 4], CPU).positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    zigzag = [PackedSequences.of([4, 8], CPU, context_size=2, context_rank=rank).positions.tolist() for rank in (0, 1)]
    assert zigzag == [[0, 3, 0, 1, 6, 7], [1, 2, 2, 3, 4, 5]]


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_rotation_uses_those_positions(size: int, rank: int) -> None:
    """Rotary attention is relative, so a missing restart would not show in any loss: look at the rotation itself."""
    packed = PackedSequences.of([4, 12, 8], CPU, context_size=size, context_rank=rank)
    states = torch.randn(packed.positions.numel(), 2, 8)
    got = _rotate(states, packed, packed.max_seqlen_q, size, rank)
    inverse = 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)
    angle = packed.positions[:, None] * inverse
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angle.cos(), angle.sin()))
    turned = torch.cat([-states[..., 4:], states[..., :4]], -1)
    torch.testing.assert_close(got, states * cos + turned * sin, rtol=1e-6, atol=1e-6)
    # The trap that max_seqlen avoids: a table as long as the pack makes Megatron count through it.
    assert (_rotate(states, packed, 24, size, rank) - got).abs().max() > 0.1


def _rotate(states: torch.Tensor, packed: PackedSequences, table_rows: int, size: int, rank: int) -> torch.Tensor:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    context = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    rotary = RotaryEmbedding(8, 1.0, rotary_base=10000, use_cpu_initialization=True, cp_group=context)
    frequencies = rotary.get_freqs_non_repeated(table_rows)
    table = torch.cat([frequencies, frequencies], -1)[:, None, None]
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    return apply_rotary_pos_emb(states, table, config, cu_seqlens=packed.cu_seqlens_q, cp_group=context)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"attention_dropout=0.1 needs Transformer Engine"):
        _attention(dropout=0.1)
    states = torch.zeros(3, 4, 8)
    with pytest.raises(TypeError, match="PackedSequences"):
        _attention()(states, states, states, None)


def test_scaled_dot_product_is_the_reference() -> None:
    """One long sequence alone is torch's own causal attention, bit for bit."""
    q, k, v = (torch.randn(SHORT + 1, 4, 8) for _ in range(3))
    got = _attention()(q, k, v, None, packed_seq_params=PackedSequences.of([SHORT + 1], CPU))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).flatten(1)
    assert torch.equal(got, wanted)
