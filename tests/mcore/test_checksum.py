"""The weights checksum: one bit, one swap or one name away is another checksum."""

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
