"""The sampler on hand-made logits."""

import pytest
import torch

from asympo_megatron.engine.params import SamplingParams
from asympo_megatron.engine.sampler import Sampler, seeded_uniform
from asympo_megatron.engine.sequence import Sequence
from asympo_megatron.errors import EngineError

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]


def row(prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), logprob: bool = False, **params) -> Sequence:
    return Sequence(
        rid="r",
        prompt_ids=list(prompt),
        params=SamplingParams(**params),
        stop_ids=frozenset({0}),
        max_new_tokens=8,
        future=None,
        output_ids=list(output),
        return_logprob=logprob,
    )


def logits(rows: int) -> torch.Tensor:
    return torch.tensor(PROBABILITIES).log().repeat(rows, 1)


def draw(count: int = 4000, **params) -> torch.Tensor:
    """Observed frequencies of many rows with the same parameters."""
    sampler = Sampler([row(**params)] * count, torch.Generator().manual_seed(0))
    tokens, _ = sampler.sample(logits(count))
    return torch.bincount(tokens, minlength=len(PROBABILITIES)) / count


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"top_k": 99}, 5),
        ({"top_p": 0.39}, 1),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.75}, 3),
        ({"min_p": 0.3}, 3),
        ({"min_p": 1.0}, 1),
        ({"top_p": 0.9, "top_k": 3, "min_p": 0.5}, 2),
    ],
)
def test_truncation_keeps_the_right_tokens_in_proportion(params: dict[str, float], kept: int) -> None:
    expected = torch.tensor(PROBABILITIES)
    expected[kept:] = 0
    expected /= expected.sum()
    # Five standard errors of 4,000 draws; what is cut must never be drawn at all.
    frequencies = draw(**params)
    assert frequencies[kept:].sum() == 0
    assert torch.allclose(frequencies, expected, atol=5 * (0.25 / 4000) ** 0.5)


def test_temperature_sharpens() -> None:
    expected = torch.softmax(torch.tensor(PROBABILITIES).log() / 0.5, -1)
    assert torch.allclose(draw(temperature=0.5), expected, atol=0.04)
    assert not torch.allclose(draw(temperature=1.0), expected, atol=0.04)


def test_rows_with_different_parameters_share_a_batch() -> None:
    rows = [row(temperature=0), row(temperature=1.0, sampling_seed=3), row(temperature=1e-7), row(top_k=1)]
    tokens, logprob = Sampler(rows, torch.Generator()).sample(logits(4))
    assert tokens[[0, 2, 3]].tolist() == [0, 0, 0]
    assert logprob is None


def test_logprobs_of_greedy_rows_are_at_temperature_one() -> None:
    rows = [row(temperature=0, logprob=True), row(temperature=2.0, logprob=True, top_k=1)]
    _, logprob = Sampler(rows, torch.Generator()).sample(logits(2))
    assert logprob is not None
    assert torch.allclose(logprob[0].exp(), torch.tensor(PROBABILITIES))
    assert torch.allclose(logprob[1], torch.log_softmax(torch.tensor(PROBABILITIES).log() / 2, -1))


def test_a_seed_gives_the_same_token_at_a_position_whatever_the_batch() -> None:
    seeded = row(sampling_seed=11, output=(1, 2))
    alone, _ = Sampler([seeded], torch.Generator().manual_seed(0)).sample(logits(1))
    crowd, _ = Sampler([row()] * 7 + [seeded], torch.Generator().manual_seed(5)).sample(logits(8))
    assert crowd[-1] == alone[0]


def test_seeded_uniforms_are_uniform_over_seeds_and_over_positions() -> None:
    for values in (
        [seeded_uniform(seed, 0) for seed in range(5000)],
        [seeded_uniform(-1, position) for position in range(5000)],
    ):
        sample = torch.tensor(values)
        assert 0 <= sample.min() < sample.max() < 1
        ordered = sample.sort().values
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the 0.1% quantile.
        distance = (ordered - (torch.arange(5000) + 0.5) / 5000).abs().max()
        assert distance < 1.95 / 5000**0.5
    pairs = torch.tensor([[seeded_uniform(seed, 0), seeded_uniform(seed, 1)] for seed in range(5000)])
    assert abs(torch.corrcoef(pairs.T)[0, 1]) < 0.06


def test_penalties_by_hand() -> None:
    values = torch.tensor([[1.0, 1.0, -1.0, 1.0]])
    rows = [row(prompt=(3,), output=(1, 1, 2), logprob=True, frequency_penalty=0.5, presence_penalty=0.25)]
    _, logprob = Sampler(rows, torch.Generator()).sample(values.clone())
    assert torch.allclose(logprob, torch.log_softmax(torch.tensor([[1.0, -0.25, -1.75, 1.0]]), -1))
    rows = [row(prompt=(3,), output=(2,), logprob=True, repetition_penalty=2.0)]
    _, logprob = Sampler(rows, torch.Generator()).sample(values.clone())
    assert torch.allclose(logprob, torch.log_softmax(torch.tensor([[1.0, 1.0, -2.0, 0.5]]), -1))


def test_min_new_tokens_forbids_stops_only_until_then() -> None:
    early, late = row(temperature=0, min_new_tokens=2, output=(1,)), row(temperature=0, min_new_tokens=2, output=(1, 1))
    tokens, _ = Sampler([early, late], torch.Generator()).sample(logits(2))
    assert tokens.tolist() == [1, 0]


def test_logits_that_are_not_finite_are_an_error() -> None:
    broken = logits(2)
    broken[1, 2] = torch.nan
    with pytest.raises(EngineError, match="not finite"):
        Sampler([row(), row()], torch.Generator()).sample(broken)
