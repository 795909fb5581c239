"""What a real SGLang server samples, beside transformers; and the traps that the controller is built around."""

from typing import Any

import pytest
import torch
from engine_client import PROMPT, EngineClient, generate_body, logprobs
from test_engine_generation import PROMPTS, greedy_reference, logprob_reference

SHARED = [3 + number % 250 for number in range(200)]
"""A prompt long enough that most of it is served from the prefix cache the second time."""


def generate(engine: EngineClient, ids: list[int], key: str, count: int = 24) -> dict[str, Any]:
    """Greedy tokens under an ``extra_key``, as the controller asks for them."""
    return engine.post("/generate", generate_body(ids, max_new_tokens=count) | {"extra_key": key})


def test_greedy_tokens_and_logprobs_equal_transformers(
    engine: EngineClient, references: dict[str, torch.nn.Module]
) -> None:
    lengths = [24, 40, 7, 16, 30, 1]
    answers = [engine.start(ids, max_new_tokens=n) for ids, n in zip(PROMPTS, lengths, strict=True)]
    for ids, count, answer in zip(PROMPTS, lengths, [future.result(60) for future in answers], strict=True):
        assert answer["output_ids"] == greedy_reference(references["qwen3"], ids, count)
        expected = logprob_reference(references["qwen3"], ids, answer["output_ids"])
        assert logprobs(answer) == pytest.approx(expected, abs=1e-5)


def test_sampled_logprobs_are_of_the_tempered_softmax_before_truncation(
    engine: EngineClient, references: dict[str, torch.nn.Module]
) -> None:
    answer = engine.generate(max_new_tokens=32, temperature=0.7, top_p=0.8, top_k=20)
    expected = logprob_reference(references["qwen3"], PROMPT, answer["output_ids"], temperature=0.7)
    assert logprobs(answer) == pytest.approx(expected, abs=1e-5)
    untempered = logprob_reference(references["qwen3"], PROMPT, answer["output_ids"])
    assert logprobs(answer) != pytest.approx(untempered, abs=1e-2)  # the mutant without temperature


def test_a_new_cache_key_gives_the_new_weights_after_an_update_in_place(
    engine: EngineClient, references: dict[str, torch.nn.Module]
) -> None:
    """Right after an update that keeps the prefix cache, a prompt whose prefix it knows: tokens equal transformers'."""
    before = generate(engine, SHARED, key="1")
    assert before["output_ids"] == greedy_reference(references["qwen3"], SHARED, 24)
    engine.update_now(engine.model_b, "2", flush_cache=False)
    after = generate(engine, SHARED, key="2")
    expected = greedy_reference(references["qwen3_b"], SHARED, 24)
    assert after["output_ids"] == expected != before["output_ids"]
    assert after["meta_info"]["cached_tokens"] == 0
    again = generate(engine, SHARED, key="2")
    assert again["meta_info"]["cached_tokens"] >= len(SHARED) - 1, "within a version the cache does its work"
    assert again["output_ids"] == expected


def test_trap_an_old_cache_key_reuses_stale_keys_and_claims_the_new_version(
    engine: EngineClient, references: dict[str, torch.nn.Module]
) -> None:
    """The mutant of the test above, and the reason for ``extra_key``: should this ever fail, the trap is gone."""
    generate(engine, SHARED, key="1")
    engine.update_now(engine.model_b, "2", flush_cache=False)
    stale = generate(engine, SHARED, key="1")
    assert stale["meta_info"]["cached_tokens"] >= len(SHARED) - 1
    assert logprobs(stale) != pytest.approx(
        logprob_reference(references["qwen3_b"], SHARED, stale["output_ids"]), abs=1e-3
    )
    assert [span["version"] for span in stale["meta_info"]["weight_versions"]] == ["2"]


def test_one_response_spans_three_versions(engine: EngineClient) -> None:
    running = engine.start(max_new_tokens=600)
    engine.wait_for(running=1)
    for version, model in (("1", engine.model_b), ("2", engine.model_a)):
        with engine.paused("in_place"):
            engine.update_now(model, version, flush_cache=False)
        before = engine.load()["num_used_tokens"]
        while engine.load()["num_running_reqs"] and engine.load()["num_used_tokens"] <= before:
            pass  # until a token is sampled by this version
    spans = running.result(60)["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "1", "2"]
    assert [span["start"] for span in spans[1:]] == [span["end"] for span in spans[:-1]]
    assert spans[-1]["end"] == 600


def test_checksums_are_of_the_tensors_themselves(engine: EngineClient) -> None:
    """Fused tensors are the concatenation of ours: so a checksum that the trainer computes can be compared."""
    import hashlib

    from safetensors.torch import load_file

    weights = load_file(engine.model_a / "model.safetensors")
    first = "model.layers.0."

    def digest(*names: str) -> str:
        whole = torch.cat([weights[name] for name in names])
        return hashlib.sha256(whole.reshape(-1).view(torch.uint8).numpy()).hexdigest()[:16]

    got = engine.post("/weights_checker", {"action": "checksum"})["ranks"][0]["checksums"]
    attention = [f"{first}self_attn.{letter}_proj.weight" for letter in "qkv"]
    assert got[f"{first}self_attn.qkv_proj.weight"] == digest(*attention)
    assert got[f"{first}mlp.down_proj.weight"] == digest(f"{first}mlp.down_proj.weight")
    assert got["model.embed_tokens.weight"] == digest("model.embed_tokens.weight")
