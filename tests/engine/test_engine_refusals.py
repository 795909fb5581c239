"""What holds for the embedded engine alone: its words, and requests that a real server dies of or cannot be asked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_client import EngineClient
from safetensors.torch import load_file, save_file

from asympo_megatron.sync import write_version


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"input_ids": [5, 6', "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"", "cannot be read"),
        (b"[]", "cannot be read"),
        (b'{"input_ids": [5.5]}', "cannot be read"),
        (b'{"input_ids": "5"}', "cannot be read"),
        (b'{"input_ids": [5, [6]]}', "mixes token ids"),
        (b'{"input_ids": [[[6]]]}', "cannot be read"),
        (b'{"input_ids": []}', "input_ids is empty"),
        (b'{"input_ids": [[]]}', "no token"),
        (b'{"input_ids": [5, -1]}', "token id -1 is outside the model's vocabulary of 320"),
        (b'{"input_ids": [5, 320]}', "token id 320 is outside the model's vocabulary of 320"),
        (b'{"input_ids": [5], "stream": true}', "stream=true is not supported"),
        (b'{"input_ids": [5], "sampling_params": {"regex": "a+"}}', "regex is not supported"),
        (b'{"input_ids": [5], "sampling_params": {"top_p": 0}}', "top_p must be in (0, 1], got 0"),
        (b'{"input_ids": [5], "sampling_params": {"top_k": 0}}', "top_k must be -1"),
        (b'{"input_ids": [5], "sampling_params": {"min_p": 2}}', "min_p must be in [0, 1], got 2"),
        (b'{"input_ids": [5], "sampling_params": {"n": 0}}', "n must be at least 1"),
        (b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 0}}', "max_new_tokens must be at least 1"),
        (b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 1024}}', "Lower max_new_tokens"),
        (b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 2, "min_new_tokens": 3}}', "min_new_tokens must"),
        (b'{"input_ids": [5], "sampling_params": {"repetition_penalty": 0}}', "repetition_penalty must"),
        (b'{"input_ids": [5], "sampling_params": {"presence_penalty": 3}}', "presence_penalty must"),
        (b'{"input_ids": [5], "sampling_params": [{}, {}]}', "2 entries for 1 prompts"),
        (b'{"input_ids": [[5], [6]], "rid": ["a"]}', "1 entries for 2 responses"),
        (b'{"input_ids": [[5], [6]], "rid": ["a", "a"]}', "Duplicate request ID"),
        (b'{"input_ids": [5], "top_logprobs_num": 999}', "top_logprobs_num must"),
    ],
)
def test_bad_generate_body_is_refused_with_its_reason(engine: EngineClient, body: bytes, words: str) -> None:
    status, answer = engine.call("/generate", body, "POST")
    assert status == 400
    assert words in answer["error"]["message"]
    assert engine.generate(max_new_tokens=1)["meta_info"]["completion_tokens"] == 1  # and the engine lives on


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/pause_generation", {"mode": "sleep"}, "expected one of abort, retract, in_place"),
        ("/update_weights_from_disk", {}, "model_path"),
        ("/weights_checker", {"action": "compare"}, "only checksum"),
        ("/flush_cache?timeout=soon", {}, "expected seconds"),
        ("/update_weights_from_tensor", {}, "serialized_named_tensors"),
        ("/end_weight_update", {}, "no weight-update session is open"),
    ],
)
def test_bad_control_call_is_refused_with_its_reason(
    engine: EngineClient, path: str, body: dict[str, Any], words: str
) -> None:
    status, answer = engine.call(path, body, "POST")
    assert status == 400
    assert words in json.dumps(answer)


def test_released_memory_holds_requests_until_it_is_resumed(engine: EngineClient) -> None:
    running = engine.start(rid="busy", max_new_tokens=400)
    engine.wait_for(running=1)
    status, answer = engine.call("/release_memory_occupation", {}, "POST")
    assert status == 400
    assert "idle engine" in answer["error"]["message"]
    engine.post("/abort_request", {"rid": "busy"})
    running.result()
    engine.post("/release_memory_occupation")
    held = engine.start(max_new_tokens=2)
    engine.wait_for(waiting=1)
    engine.post("/resume_memory_occupation")
    assert held.result()["meta_info"]["completion_tokens"] == 2


def test_abort_reaches_held_requests(engine: EngineClient) -> None:
    with engine.paused("in_place"):
        held = engine.start(rid="held", max_new_tokens=4)
        engine.wait_for(waiting=1)
        engine.post("/abort_request", {"rid": "held"})
        answer = held.result()
    assert answer["output_ids"] == []
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert answer["meta_info"]["weight_versions"] == []


def damaged_copies(models: dict[str, Path], root: Path) -> dict[str, tuple[Path, str]]:
    """Directories that must not be loaded, and the words that say why."""
    weights = load_file(models["qwen3_b"] / "model.safetensors")
    published = write_version(root / "published", 1, 1, weights.items(), "x", models["qwen3_b"])
    file = published / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    cut = root / "cut"
    shutil.copytree(models["qwen3_b"], cut)
    (cut / "model.safetensors").write_bytes((models["qwen3_b"] / "model.safetensors").read_bytes()[:-1000])

    lacking = root / "lacking"
    shutil.copytree(models["qwen3_b"], lacking)
    save_file({k: v for k, v in weights.items() if "o_proj" not in k}, lacking / "model.safetensors", {"format": "pt"})

    wider = root / "wider"
    shutil.copytree(models["qwen3_b"], wider)
    shape = torch.zeros(321, 64)
    save_file(weights | {"lm_head.weight": shape}, wider / "model.safetensors", {"format": "pt"})

    empty = root / "empty"
    empty.mkdir()
    return {
        "bit flip": (published, "sha256"),
        "truncated": (cut, "Failed to load weights"),
        "tensor missing": (lacking, "o_proj"),
        "other shape": (wider, "lm_head.weight"),
        "no file": (empty, "no safetensors file"),
        "nothing": (root / "nothing", "not a directory"),
    }


def test_failed_update_changes_nothing(engine: EngineClient, models: dict[str, Path], tmp_path: Path) -> None:
    before = engine.generate(max_new_tokens=20)["output_ids"]
    checksum = engine.post("/weights_checker", {"action": "checksum"})["per_engine_checksum"]
    for name, (path, words) in damaged_copies(models, tmp_path).items():
        body = {"model_path": str(path), "weight_version": "broken"}
        status, answer = engine.call("/update_weights_from_disk", body, "POST")
        assert (status, answer["success"], answer["num_paused_requests"]) == (400, False, 0), name
        assert words in answer["message"], (name, answer)
    assert engine.call("/model_info")[1]["weight_version"] == "default"
    assert engine.call("/model_info")[1]["model_path"] == str(engine.model_a)
    assert engine.post("/weights_checker", {"action": "checksum"})["per_engine_checksum"] == checksum
    assert engine.generate(max_new_tokens=20)["output_ids"] == before
