"""Answers of the engine beside the recorded answers of the real server: status, keys, types, words."""

import json
from typing import Any

import pytest
from engine_client import EngineClient, assert_like, recording

NOT_SERVED = ("/v1/chat/completions", "/v1/completions")
STATEFUL = ("/pause_generation", "/continue_generation", "/flush_cache")
"""Their recorded answers depend on what runs; test_engine_updates.py brings those states about."""

SAME_WORDS = (
    "/get_load",
    "/get_weights_by_name",
    "/update_weight_version",
    "/begin_weight_update",
    "/end_weight_update",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/health",
    "/health_generate",
    "/ready",
    "/abort_request",
)


def entries() -> list[Any]:
    chosen = [
        entry for entry in recording() if "path" in entry and entry["path"].split("?")[0] not in NOT_SERVED + STATEFUL
    ]
    return [pytest.param(entry, id=f"{number}{entry['path']}") for number, entry in enumerate(chosen)]


def adapt(engine: EngineClient, request: dict[str, Any] | None) -> dict[str, Any] | None:
    """The recorded request for the models of this run."""
    if request is None:
        return None
    text = json.dumps(request).replace("MODEL_DIR/qwen3_b", str(engine.model_b))
    request = json.loads(text.replace("MODEL_DIR/qwen3", str(engine.model_a)))
    ids = request.get("input_ids", [])
    if ids and isinstance(ids[-1], str):  # "…(1588 items)"
        request["input_ids"] = [3 + number % 250 for number in range(1588)]
    sampling = request.get("sampling_params", {})
    if sampling.get("stop_token_ids"):  # the fourth greedy token there; the fourth greedy token here
        sampling["stop_token_ids"] = engine.generate(ids, max_new_tokens=4)["output_ids"][-1:]
    return request


@pytest.mark.parametrize("entry", entries())
def test_recorded_exchange(engine: EngineClient, entry: dict[str, Any]) -> None:
    if entry["path"] == "/end_weight_update":
        engine.post("/begin_weight_update")
    if entry["path"] == "/resume_memory_occupation":  # a real server dies when there is nothing to resume
        engine.post("/release_memory_occupation")
    status, got = engine.call(entry["path"], adapt(engine, entry["request"]), entry["method"])
    if entry["path"] == "/release_memory_occupation":
        engine.post("/resume_memory_occupation")
    assert status == entry["status"], got
    assert_like(entry["response"], got)
    if entry["path"] in SAME_WORDS or (entry["path"] == "/generate" and status == 400):
        assert got == entry["response"]


def test_comparison_notices_a_missing_key_and_a_wrong_type() -> None:
    recorded = {"meta_info": {"id": "x", "completion_tokens": 4}}
    with pytest.raises(AssertionError, match="lacks"):
        assert_like(recorded, {"meta_info": {"id": "x"}})
    with pytest.raises(AssertionError, match="completion_tokens"):
        assert_like(recorded, {"meta_info": {"id": "x", "completion_tokens": "4"}})


def test_finish_reasons_match_the_recording(engine: EngineClient) -> None:
    greedy = engine.generate(max_new_tokens=8)
    assert greedy["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    stop = greedy["output_ids"][3]
    stopped = engine.generate(max_new_tokens=8, ignore_eos=False, stop_token_ids=[stop])
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stopped["output_ids"] == greedy["output_ids"][: greedy["output_ids"].index(stop) + 1]
    ignored = engine.generate(max_new_tokens=8, ignore_eos=True, stop_token_ids=[stop])
    assert ignored["output_ids"] == greedy["output_ids"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"input_ids": [5, 6',
        b"\xff\xfe\x00",
        b"",
        b"[]",
        b'{"input_ids": [5.5]}',
        b'{"input_ids": "5"}',
        b'{"input_ids": [5, [6]]}',
        b'{"input_ids": [[[6]]]}',
        b'{"input_ids": []}',
        b'{"input_ids": [5], "sampling_params": {"top_p": 0}}',
        b'{"input_ids": [5], "sampling_params": {"top_k": 0}}',
        b'{"input_ids": [5], "sampling_params": {"min_p": 2}}',
        b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 1024}}',
        b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 2, "min_new_tokens": 3}}',
        b'{"input_ids": [5], "sampling_params": {"presence_penalty": 3}}',
    ],
)
def test_bad_body_is_refused_and_the_engine_lives_on(engine: EngineClient, body: bytes) -> None:
    assert engine.call("/generate", body, "POST")[0] == 400
    assert engine.generate(max_new_tokens=1)["meta_info"]["completion_tokens"] == 1


def test_a_second_session_is_refused(engine: EngineClient) -> None:
    engine.post("/begin_weight_update")
    status, answer = engine.call("/begin_weight_update", {}, "POST")
    assert (status, answer["success"]) == (400, False)
    engine.post("/end_weight_update")
    engine.post("/begin_weight_update")


def test_wrong_method_and_path(engine: EngineClient) -> None:
    assert engine.call("/generate", None, "GET") == (405, {"detail": "Method Not Allowed"})
    assert engine.call("/nowhere", None, "GET") == (404, {"detail": "Not Found"})
