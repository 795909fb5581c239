"""Pauses, aborts and weight updates while requests run; every recorded state of the real server is brought about."""

from pathlib import Path
from typing import Any

import torch
from engine_client import PROMPT, EngineClient, assert_like, generate_body, logprobs, recording
from safetensors.torch import load_file

from asympo_megatron.sync import verify_version, write_version

LONG = 400
"""Tokens enough to still be running when the test thread gets to its next call."""
LONGER = 900
"""The same for a call that must come before the end, whatever else the machine does."""


def recorded_pause(name: str) -> list[Any]:
    return next(entry[name] for entry in recording() if name in entry)


def check_pause_record(name: str, answers: list[dict[str, Any]]) -> None:
    """The recorded meta_info of a pause scenario, request by request (matched by id)."""
    recorded = {meta["id"]: meta for _, meta, _ in recorded_pause(name)}
    for answer in answers:
        meta = answer["meta_info"]
        expected = recorded[meta["id"]]
        assert_like(expected, {key: meta[key] for key in expected})
        assert meta["num_retractions"] == expected["num_retractions"]
        assert meta["finish_reason"]["type"] == expected["finish_reason"]["type"]
        assert [span["version"] for span in meta["weight_versions"]] == [
            span["version"] for span in expected["weight_versions"]
        ]
        assert len(answer["output_ids"]) == len(logprobs(answer)) == meta["completion_tokens"]


@torch.no_grad()
def continue_greedily(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    out = model.generate(given, attention_mask=mask, do_sample=False, max_new_tokens=count, eos_token_id=None)
    return out[0, len(ids) :].tolist()


def test_pause_abort_returns_partials_and_holds_new_requests(engine: EngineClient) -> None:
    engine.post("/update_weight_version", {"new_version": "default"})
    running = [engine.start(rid=f"abort{row}", max_new_tokens=LONG) for row in range(2)]
    engine.wait_for(running=2)
    with engine.paused("abort"):
        partial = [future.result() for future in running]
        late = engine.start(rid="late-abort", max_new_tokens=4)
        assert not late.done()
        assert engine.call("/flush_cache", {}, "POST")[0] == 200
        engine.update_now(engine.model_b, "v-abort")
    check_pause_record("pause_abort", [*partial, late.result()])
    assert all(0 < answer["meta_info"]["completion_tokens"] < LONG for answer in partial)
    assert engine.generate(max_new_tokens=4)["output_ids"] == late.result()["output_ids"]


def test_retract_continues_under_new_weights_as_a_fresh_request_would(
    engine: EngineClient, references: dict[str, torch.nn.Module]
) -> None:
    engine.post("/update_weight_version", {"new_version": "v-abort"})
    running = [engine.start([*PROMPT, row], f"retract{row}", max_new_tokens=LONG) for row in range(2)]
    engine.wait_for(running=2)
    with engine.paused("retract"):
        late = engine.start(rid="late-retract", max_new_tokens=4)
        assert engine.call("/flush_cache", {}, "POST")[0] == 200
        engine.update_now(engine.model_b, "v-retract")
    answers = [future.result() for future in running]
    check_pause_record("pause_retract", [*answers, late.result()])
    for row, answer in enumerate(answers):
        old, new = answer["meta_info"]["weight_versions"]
        assert (old["start"], old["end"], new["end"]) == (0, new["start"], LONG)
        kept = [*PROMPT, row, *answer["output_ids"][: new["start"]]]
        fresh = continue_greedily(references["qwen3_b"], kept, 40)
        assert answer["output_ids"][new["start"] :][:40] == fresh
        stale = continue_greedily(references["qwen3"], kept, 40)
        assert fresh != stale  # the mutant that keeps the old weights


def test_in_place_continues_on_the_old_cache(engine: EngineClient, references: dict[str, torch.nn.Module]) -> None:
    engine.post("/update_weight_version", {"new_version": "v-retract"})
    running = [engine.start([*PROMPT, row], f"in_place{row}", max_new_tokens=LONG) for row in range(2)]
    engine.wait_for(running=2)
    with engine.paused("in_place"):
        late = engine.start(rid="late-in_place", max_new_tokens=4)
        assert engine.call("/flush_cache", {}, "POST") == (400, "Flush cache failed.\n")
        body = {"model_path": str(engine.model_b), "weight_version": "v-in_place", "flush_cache": True}
        status, refused = engine.call("/update_weights_from_disk", body, "POST")
        assert (status, refused["success"]) == (400, False)
        assert "the cache was not flushed" in refused["message"]
        engine.update_now(engine.model_b, "v-in_place", flush_cache=False)
    answers = [future.result() for future in running]
    check_pause_record("pause_in_place", [*answers, late.result()])
    for row, answer in enumerate(answers):
        split = answer["meta_info"]["weight_versions"][1]["start"]
        kept = [*PROMPT, row, *answer["output_ids"][:split]]
        mixed = continue_on_old_cache(references["qwen3"], references["qwen3_b"], kept, 40)
        assert answer["output_ids"][split:][:40] == mixed
        assert mixed != continue_greedily(references["qwen3_b"], kept, 40)  # the mutant that recomputes the cache


@torch.no_grad()
def continue_on_old_cache(old: torch.nn.Module, new: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    """Keys and values of all but the last token from ``old``; everything after by ``new``."""
    cache = old(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
    token, sampled = ids[-1], []
    for _ in range(count):
        output = new(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        token = int(output.logits[0, -1].argmax())
        sampled.append(token)
    return sampled


def test_update_without_pause_waits_for_running_requests_and_holds_new_ones(engine: EngineClient) -> None:
    running = engine.start(max_new_tokens=LONG)
    engine.wait_for(running=1)
    # Without a flush: a real server's scheduler may still hold the request when its answer is out, and refuses one.
    engine.update_now(engine.model_b, "v2", flush_cache=False)
    assert [span["version"] for span in running.result()["meta_info"]["weight_versions"]] == ["default"]
    assert engine.generate(max_new_tokens=2)["meta_info"]["weight_version"] == "v2"


def test_a_paused_server_is_not_ready_and_a_refused_update_leaves_it_paused(engine: EngineClient) -> None:
    assert engine.call("/ready")[0] == 200
    with engine.paused("in_place"):
        assert engine.call("/ready")[0] == 503
        body = {"model_path": str(engine.model_b), "weight_version": "2", "load_format": "dummy"}
        status, answer = engine.call("/update_weights_from_disk", body, "POST")
        assert (status, answer["success"]) == (400, False), "a format that reads no files"
        assert engine.call("/ready")[0] == 503
        assert engine.call("/model_info")[1]["weight_version"] == "default"
        engine.post("/update_weights_from_disk", body | {"load_format": "auto"})
    assert engine.call("/ready")[0] == 200
    assert engine.call("/model_info")[1]["weight_version"] == "2"


def test_abort_matches_by_prefix(engine: EngineClient) -> None:
    rids = ["run.1.g1", "run.1.g10", "run.1.g2", "other"]
    running = {rid: engine.start(rid=rid, max_new_tokens=LONGER) for rid in rids}
    engine.wait_for(running=4)
    assert engine.call("/abort_request", {"rid": "run.1.g1"}, "POST") == (200, "")
    for rid in rids[:2]:
        meta = running[rid].result()["meta_info"]
        assert meta["finish_reason"] == {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        assert 0 < meta["completion_tokens"] < LONGER
    for rid in rids[2:]:
        assert running[rid].result()["meta_info"]["completion_tokens"] == LONGER


def test_a_rid_that_no_request_has_aborts_nothing(engine: EngineClient) -> None:
    """Neither the empty one nor a mere prefix, though an exact rid takes along all that begin with it."""
    running = [engine.start(rid=rid, max_new_tokens=LONG) for rid in ("run.a", "run.b")]
    engine.wait_for(running=2)
    for rid in ("", "run."):
        engine.post("/abort_request", {"rid": rid})
    assert [future.result()["meta_info"]["finish_reason"]["type"] for future in running] == ["length", "length"]


def test_a_rid_in_use_is_refused(engine: EngineClient) -> None:
    running = engine.start(rid="twice", max_new_tokens=LONGER)
    engine.wait_for(running=1)
    status, answer = engine.call("/generate", generate_body(PROMPT, "twice", max_new_tokens=1), "POST")
    assert status == 400
    assert "Duplicate request ID detected: twice" in answer["error"]["message"]
    engine.post("/abort_request", {"rid": "twice"})
    assert running.result()["meta_info"]["finish_reason"]["type"] == "abort"
    assert engine.generate(rid="twice", max_new_tokens=1)["meta_info"]["id"] == "twice"


def test_flush_waits_for_its_timeout(engine: EngineClient) -> None:
    running = engine.start(max_new_tokens=200)
    engine.wait_for(running=1)
    status, text = engine.call("/flush_cache?timeout=30", {}, "POST")
    assert status == 200
    assert text.startswith("Cache flushed.")
    assert running.result(1)["meta_info"]["completion_tokens"] == 200


def test_relabel_while_running_starts_a_span(engine: EngineClient) -> None:
    running = engine.start(max_new_tokens=LONG)
    engine.wait_for(running=1)
    engine.post("/update_weight_version", {"new_version": "seven", "abort_all_requests": False})
    spans = running.result()["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "seven"]
    assert spans[0]["end"] == spans[1]["start"] > 0


def test_published_version_is_served(
    engine: EngineClient, models: dict[str, Path], references: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    """Trainer's writer to engine, in several shards, greedy tokens as transformers gives them."""
    weights = load_file(models["qwen3_b"] / "model.safetensors")
    path = write_version(tmp_path, 3, 3, weights.items(), "abc", models["qwen3_b"], shard_bytes=100_000)
    assert len(list(path.glob("*.safetensors"))) > 2
    assert verify_version(path).version == 3
    engine.update(path, "3")
    answer = engine.generate(max_new_tokens=20)
    assert answer["output_ids"] == continue_greedily(references["qwen3_b"], PROMPT, 20)
    assert answer["meta_info"]["weight_version"] == "3"
    info = engine.call("/model_info")[1]
    assert (info["model_path"], info["weight_version"]) == (str(path), "3")


def test_checksums_follow_the_weights(engine: EngineClient) -> None:
    def read() -> dict[str, Any]:
        return engine.post("/weights_checker", {"action": "checksum"})

    first = read()
    engine.update(engine.model_b, "b")
    second = read()
    engine.update(engine.model_a, "a")
    assert second["per_engine_checksum"] != first["per_engine_checksum"]
    assert second["ranks"][0]["checksums"]["lm_head.weight"] != first["ranks"][0]["checksums"]["lm_head.weight"]
    assert read() == first
