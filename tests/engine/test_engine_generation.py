"""What the engine samples, beside transformers."""

from pathlib import Path

import pytest
import torch
from engine_client import PROMPT, EngineClient, logprobs

from asympo_megatron.engine import EngineOptions
from asympo_megatron.testing.engine_server import engine_server

PROMPTS = [PROMPT, [20], list(range(40, 90)), [9, 8, 7], list(range(100, 117)), [200, 3]]


def greedy_reference(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, eos_token_id=None
    )
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def logprob_reference(
    model: torch.nn.Module, ids: list[int], response: list[int], temperature: float = 1.0
) -> list[float]:
    logits = model(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1]
    table = torch.log_softmax(logits.float() / temperature, -1)
    return table.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1).tolist()


@pytest.mark.parametrize("kind", ["qwen3", "llama", "tied"])
def test_greedy_tokens_and_logprobs_equal_transformers(
    models: dict[str, Path], references: dict[str, torch.nn.Module], kind: str
) -> None:
    """Six prompts of different lengths at once: padding, joining and leaving change nothing."""
    model = references[kind]
    with engine_server(EngineOptions(str(models[kind]), threads=1)) as url:
        client = EngineClient(url, models[kind], models[kind])
        lengths = [24, 40, 7, 16, 30, 1]
        answers = [client.start(ids, max_new_tokens=n) for ids, n in zip(PROMPTS, lengths, strict=True)]
        for ids, count, answer in zip(PROMPTS, lengths, [future.result() for future in answers], strict=True):
            assert answer["output_ids"] == greedy_reference(model, ids, count)
            expected = logprob_reference(model, ids, answer["output_ids"])
            assert logprobs(answer) == pytest.approx(expected, abs=1e-5)


def test_batched_ids_equal_single_requests(engine: EngineClient) -> None:
    batched = engine.generate(PROMPTS, max_new_tokens=12)
    singles = [engine.generate(ids, max_new_tokens=12) for ids in PROMPTS]
    assert [answer["output_ids"] for answer in batched] == [answer["output_ids"] for answer in singles]


def test_sampled_logprobs_are_of_the_tempered_softmax_before_truncation(
    engine: EngineClient, references: dict[str, torch.nn.Module]
) -> None:
    answer = engine.generate(max_new_tokens=32, temperature=0.7, top_p=0.8, top_k=20)
    expected = logprob_reference(references["qwen3"], PROMPT, answer["output_ids"], temperature=0.7)
    assert logprobs(answer) == pytest.approx(expected, abs=1e-5)
    untempered = logprob_reference(references["qwen3"], PROMPT, answer["output_ids"])
    assert logprobs(answer) != pytest.approx(untempered, abs=1e-2)  # the mutant without temperature


def test_top_and_input_logprobs(engine: EngineClient, references: dict[str, torch.nn.Module]) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}}
    answer = engine.post("/generate", body | {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2})
    meta = answer["meta_info"]
    given = [value for value, _, _ in meta["input_token_logprobs"]]
    assert given[0] is None
    assert given[1:] == pytest.approx(logprob_reference(references["qwen3"], PROMPT[:1], PROMPT[1:]), abs=1e-5)
    assert [token for _, token, _ in meta["input_token_logprobs"]] == PROMPT
    # Greedy tokens lead their own list.
    assert [best[0][:2] for best in meta["output_top_logprobs"]] == [
        entry[:2] for entry in meta["output_token_logprobs"]
    ]


def test_n_responses_of_one_prompt_differ_and_carry_their_own_ids(engine: EngineClient) -> None:
    answers = engine.generate(rid="group", n=4, temperature=1.0, max_new_tokens=12)
    assert [answer["meta_info"]["id"] for answer in answers] == [f"group_{row}" for row in range(4)]
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 4


def test_seeded_sampling_does_not_depend_on_the_batch(engine: EngineClient) -> None:
    alone = engine.generate(temperature=1.0, sampling_seed=7, max_new_tokens=24)["output_ids"]
    others = [engine.start(ids, temperature=1.3, max_new_tokens=40) for ids in PROMPTS]
    together = engine.generate(temperature=1.0, sampling_seed=7, max_new_tokens=24)["output_ids"]
    assert [other.result()["meta_info"]["completion_tokens"] for other in others] == [40] * len(PROMPTS)
    assert together == alone
    assert engine.generate(temperature=1.0, sampling_seed=8, max_new_tokens=24)["output_ids"] != alone


def test_text_prompt_and_text_answer(engine: EngineClient) -> None:
    ids = [ord(letter) for letter in "hello"]
    body = {"text": "hello", "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}}
    answer = engine.post("/generate", body | {"return_prompt_token_ids": True})
    assert len(answer["prompt_token_ids"]) == len(ids)
    assert engine.generate(answer["prompt_token_ids"], max_new_tokens=6)["text"] == answer["text"]


def test_stop_string_trims_text_but_not_tokens(engine: EngineClient) -> None:
    plain = engine.generate(list(range(70, 90)), max_new_tokens=60)
    readable = [position for position, letter in enumerate(plain["text"]) if letter.isascii() and letter.isprintable()]
    assert readable, "the greedy text of the test model has a printable letter"
    stop = plain["text"][readable[0]]
    options = {"max_new_tokens": 60, "ignore_eos": False, "stop": [stop]}
    cut = engine.generate(list(range(70, 90)), **options)
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert cut["text"] == plain["text"][: plain["text"].index(stop)]
    assert cut["output_ids"] == plain["output_ids"][: len(cut["output_ids"])]
    whole = engine.generate(list(range(70, 90)), no_stop_trim=True, **options)
    assert whole["text"] == plain["text"][: plain["text"].index(stop) + 1]


def test_stop_token_is_cut_from_the_text_unless_kept(engine: EngineClient) -> None:
    plain = engine.generate(max_new_tokens=8, skip_special_tokens=False)
    stop = plain["output_ids"][3]
    options = {"max_new_tokens": 8, "ignore_eos": False, "stop_token_ids": [stop], "skip_special_tokens": False}
    cut, kept = engine.generate(**options), engine.generate(no_stop_trim=True, **options)
    assert cut["output_ids"] == kept["output_ids"]
    assert cut["output_ids"][-1] == stop
    shorter = engine.generate(max_new_tokens=len(cut["output_ids"]) - 1, skip_special_tokens=False)
    same = engine.generate(max_new_tokens=len(cut["output_ids"]), skip_special_tokens=False)
    assert (cut["text"], kept["text"]) == (shorter["text"], same["text"])


def test_min_new_tokens_holds_stops_back(engine: EngineClient) -> None:
    greedy = engine.generate(max_new_tokens=8)["output_ids"]
    options = {"max_new_tokens": 8, "ignore_eos": False, "stop_token_ids": [greedy[0]]}
    assert engine.generate(**options)["output_ids"] == greedy[:1]
    later = engine.generate(min_new_tokens=3, **options)["output_ids"]
    assert len(later) >= 3
    assert greedy[0] not in later[:3]


def test_frequency_penalty_ends_repetition(engine: EngineClient) -> None:
    plain = engine.generate(max_new_tokens=80)["output_ids"]
    penalized = engine.generate(max_new_tokens=80, frequency_penalty=2.0)["output_ids"]
    assert len(set(penalized)) > len(set(plain)) + 10


def test_default_length_is_128_or_what_the_context_leaves(engine: EngineClient) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {"ignore_eos": True}}
    assert engine.post("/generate", body)["meta_info"]["completion_tokens"] == 128
    near_end = {"input_ids": [5] * 1000, "sampling_params": {"ignore_eos": True}}
    assert engine.post("/generate", near_end)["meta_info"]["completion_tokens"] == 23


def test_sampled_frequencies_follow_the_softmax(engine: EngineClient, references: dict[str, torch.nn.Module]) -> None:
    """Chi-square of 4,000 first tokens against softmax(logits / T); the temperature mutant fails it."""
    seeds = range(4000)
    body = {
        "input_ids": [PROMPT] * len(seeds),
        "sampling_params": [
            {"temperature": 0.8, "max_new_tokens": 1, "ignore_eos": True, "sampling_seed": seed} for seed in seeds
        ],
    }
    tokens = torch.tensor([answer["output_ids"][0] for answer in engine.post("/generate", body)])
    with torch.no_grad():
        logits = references["qwen3"](torch.tensor([PROMPT])).logits[0, -1].double()
    assert chi_square_z(tokens, logits / 0.8) < 3.5
    assert chi_square_z(tokens, logits / 1.0) > 8  # mutant: temperature left out
    assert chi_square_z(tokens, logits / 0.75) > 3.5  # mutant: a slightly wrong temperature


def chi_square_z(tokens: torch.Tensor, logits: torch.Tensor) -> float:
    """Pearson's statistic as a z-score; cells with fewer than 5 expected counts are merged."""
    expected = torch.softmax(logits, -1) * len(tokens)
    counts = torch.bincount(tokens, minlength=len(logits)).double()
    small = expected < 5
    expected = torch.cat([expected[~small], expected[small].sum().reshape(1)])
    counts = torch.cat([counts[~small], counts[small].sum().reshape(1)])
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5
