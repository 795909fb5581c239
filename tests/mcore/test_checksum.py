"""The weights checksum: one bit, one swap or one name away is another checksum."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from rank_programs import build

from asympo_megatron.mcore import Learner, checksum

pytestmark = pytest.mark.usefixtures("one_rank")


def _flip_a_bit(learner: Learner) -> None:
    weight = _weight(learner, "decoder.layers.1.mlp.linear_fc2.weight")
    weight.view(torch.int32)[3, 5] ^= 1


def _swap_two(learner: Learner) -> None:
    weight = _weight(learner, "embedding.word_embeddings.weight")
    weight[[1, 2]] = weight[[2, 1]].clone()


def _swap_layers(learner: Learner) -> None:
    first, second = (_weight(learner, f"decoder.layers.{i}.mlp.linear_fc1.weight") for i in (0, 1))
    first[:], second[:] = second.clone(), first.clone()


def _negate_zero(learner: Learner) -> None:
    _weight(learner, "decoder.final_layernorm.weight")[0] = -0.0


def _weight(learner: Learner, name: str) -> torch.Tensor:
    return next(shard.param.detach() for shard in learner.shards() if shard.name == name)


@pytest.mark.parametrize("change", [_flip_a_bit, _swap_two, _swap_layers, _negate_zero])
def test_every_change_shows_and_undoing_it_restores(change: Callable[[Learner], None]) -> None:
    _, _, learner = build({})
    _weight(learner, "decoder.final_layernorm.weight")[0] = 0.0
    before = learner.checksum()
    kept = [param.detach().clone() for chunk in learner.chunks for param in chunk.parameters()]
    change(learner)
    assert learner.checksum() != before
    for param, value in zip((p for chunk in learner.chunks for p in chunk.parameters()), kept, strict=True):
        param.data.copy_(value)
    assert learner.checksum() == before


def test_chunks_of_any_size_give_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, learner = build({})
    whole = learner.checksum()
    monkeypatch.setattr(checksum, "CHUNK_ELEMENTS", {"cpu": 33, "cuda": 33})
    assert learner.checksum() == whole
    assert len(whole) == 16
    int(whole, 16)


def test_seed_and_name_decide_initial_weights() -> None:
    first = build({})[2].checksum()
    assert build({})[2].checksum() == first
    assert build({"config": {"run": {"seed": 1}}})[2].checksum() != first


def _exact(name: str, whole: torch.Tensor) -> str:
    """The checksum from its definition, in Python's integers."""

    def wrap(value: int) -> int:
        return (value + (1 << 63)) % (1 << 64) - (1 << 63)

    def mix(value: int) -> int:
        value ^= value >> 30
        value = wrap(value * 0xBF58476D1CE4E5B9)
        value ^= value >> 27
        value = wrap(value * 0x94D049BB133111EB)
        return value ^ value >> 31

    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    bits = whole.view(torch.int16 if whole.itemsize == 2 else torch.int32).reshape(len(whole), -1).tolist()
    of_column = [mix(wrap(column * 0x9E3779B97F4A7C15 + ~salt)) | 1 for column in range(len(bits[0]))]
    total = 0
    for row, values in enumerate(bits):
        of_row = mix(wrap(row * 0x9E3779B97F4A7C15 + salt)) | 1
        total += of_row * sum(value * factor for value, factor in zip(values, of_column, strict=True))
    return f"{total % (1 << 64):016x}"


def _checksum(whole: torch.Tensor) -> str:
    whole_checksum = checksum.WholeChecksum()
    whole_checksum.add("a", whole)
    return whole_checksum.digits()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5,), (40, 7), (3, 1000)])
def test_it_is_the_sum_that_it_is_defined_as(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    whole = torch.randn(shape).to(dtype)
    assert _checksum(whole) == _exact("a", whole)


def test_sums_in_float64_stay_exact_for_the_largest_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = torch.full((2 * checksum._EXACT_ROWS + 9, 2), -(1 << 15), dtype=torch.int16)
    bits[::3] += 1
    whole = bits.view(torch.bfloat16)
    assert _checksum(whole) == _exact("a", whole)
    monkeypatch.setattr(checksum, "_PART_BITS", 30)  # the mutant: its sums outgrow 2^53
    assert _checksum(whole) != _exact("a", whole)
