"""What is sent to an engine and what is accepted from it, against the recording of a real SGLang server."""

import json
from pathlib import Path

import msgspec
import pytest

from asympo_megatron.errors import EngineError, TaskError
from asympo_megatron.records import VersionSpan
from asympo_megatron.rollout.answer import (
    AnswerReader,
    GenerateRequest,
    SamplingParams,
    check_prompt,
    request_id,
    run_prefix,
)

RECORDING = Path(__file__).parents[1] / "contracts" / "sglang-0.5.23.jsonl"


def recorded_answers() -> list[dict]:
    """Whole answers of single /generate requests (long ones were shortened in the recording)."""
    lines = [json.loads(line) for line in RECORDING.read_text().splitlines()]
    return [
        line["response"]
        for line in lines
        if line.get("path") == "/generate" and line["status"] == 200 and isinstance(line["response"], dict)
    ]


def asked(rid: str, max_new_tokens: int, *, logprobs: bool = False) -> GenerateRequest:
    return GenerateRequest(rid, [5, 6], SamplingParams(max_new_tokens, 1.0, 1.0, -1, [1]), "3", logprobs)


def test_recorded_answers_are_understood() -> None:
    """Every recorded answer parses once its labels are numbers, with the tokens and log-probs of the recording."""
    answers = recorded_answers()
    assert len(answers) >= 8
    for answer in answers:
        meta = answer["meta_info"]
        for span in meta["weight_versions"]:
            span["version"] = "3"
        logprobs = "output_token_logprobs" in meta
        request = asked(meta["id"], len(answer["output_ids"]), logprobs=logprobs)
        parsed = AnswerReader(512, {3}).read(json.dumps(answer).encode(), request)
        assert parsed.ids == answer["output_ids"]
        assert parsed.versions == [VersionSpan(3, 0, len(parsed.ids))]
        assert parsed.finish_reason == meta["finish_reason"]["type"]
        assert parsed.logprobs == ([entry[0] for entry in meta["output_token_logprobs"]] if logprobs else None)


def test_recorded_default_label_is_refused() -> None:
    """A real server that nobody synced says "default"."""
    answer = next(a for a in recorded_answers() if a["meta_info"]["weight_version"] == "default")
    request = asked(answer["meta_info"]["id"], 99)
    with pytest.raises(EngineError, match="weight version 'default' was never published by this run"):
        AnswerReader(512, {0, 1, 2}).read(json.dumps(answer).encode(), request)


def test_sent_fields_are_those_of_the_recorded_server() -> None:
    """Unknown sampling fields are a 400; its message lists the known ones."""
    lines = [json.loads(line) for line in RECORDING.read_text().splitlines()]
    refusal = next(str(line["response"]) for line in lines if "unknown field" in str(line.get("response")))
    body = msgspec.json.decode(msgspec.json.encode(asked("r.", 4)))
    assert set(body) == {"rid", "input_ids", "sampling_params", "extra_key", "return_logprob"}
    assert all(f"`{name}`" in refusal for name in body["sampling_params"])
    assert body["return_logprob"] is False


def test_logprobs_must_match_the_tokens() -> None:
    answer = next(a for a in recorded_answers() if a["meta_info"].get("output_token_logprobs"))
    for span in answer["meta_info"]["weight_versions"]:
        span["version"] = "0"
    request = asked(answer["meta_info"]["id"], 99, logprobs=True)
    answer["meta_info"]["output_token_logprobs"][0][1] += 1
    with pytest.raises(EngineError, match="output_token_logprobs does not match output_ids"):
        AnswerReader(512, {0}).read(json.dumps(answer).encode(), request)


def test_request_ids_are_safe_prefixes() -> None:
    """Engines abort by prefix: no id, and no run, may be a prefix of another."""
    ids = [request_id("run.", 1, f"{group:09d}", row, 0) for group in range(120) for row in range(12)]
    ids += [request_id("run.", 11, "e00000001", 0, k) for k in range(12)]
    ids += [request_id(run_prefix("run.2"), 1, "000000001", 0, 0), request_id(run_prefix("run2"), 1, "000000001", 0, 0)]
    assert not [(a, b) for a in ids for b in ids if a != b and b.startswith(a)]
    assert all(one.startswith("run.") for one in ids[:-2])
    assert not any(one.startswith(run_prefix("run")) for one in ids[-2:])
    assert all(part for part in ids[0].split(".")[:-1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "has no token"), ([3, 64], "token id 64, outside the vocabulary of 64"), ([-1], "token id -1")],
)
def test_prompts_that_would_kill_a_server(ids: list[int], message: str) -> None:
    check_prompt([0, 63], 64, "prompt 7")
    with pytest.raises(TaskError, match=f"prompt 7.*{message}"):
        check_prompt(ids, 64, "prompt 7")
