"""Weights broadcast from a sender's memory: sessions, buckets, labels, refusals. The same suite for a real server."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_client import PROMPT, EngineClient
from safetensors.torch import load_file

from asympo_megatron import protocol
from asympo_megatron.errors import EngineError, PublishError
from asympo_megatron.rollout.client import EngineClient as ControllerSide
from asympo_megatron.rollout.collective import Collective, SenderLost, SenderRefused
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.sync.sender import WeightSender

TIMEOUT_S = 30.0
BUCKET_BYTES = 100_000
LONG = 400


@pytest.fixture
def sender() -> Iterator[WeightSender]:
    sender = WeightSender("127.0.0.1", None, "gloo", BUCKET_BYTES, TIMEOUT_S)
    yield sender
    sender.close()


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def row(sender: WeightSender, version: int) -> VersionRow:
    return VersionRow(version, version, 1, f"weights-{version}", sender.address)


def controller_side(url: str) -> ControllerSide:
    return ControllerSide(url, None, request_timeout_s=60.0, control_timeout_s=TIMEOUT_S)


def transfer(engine: EngineClient, version: VersionRow, flush_cache: bool = True, token: str | None = None) -> int:
    """One whole transfer as the controller makes it; returns the number of buckets."""

    async def work() -> int:
        client = controller_side(engine.url)
        try:
            opened = await Collective("test.", token, TIMEOUT_S).open(client, version)
            try:
                await opened.run(str(version.version), flush_cache=flush_cache)
            finally:
                await opened.close()
            return len(opened.buckets)
        finally:
            await client.close()

    return asyncio.run(work())


def test_broadcast_weights_equal_those_from_disk(engine: EngineClient, sender: WeightSender) -> None:
    """By checksum of every tensor and by what is sampled."""
    before, answer_before = engine.digest(), engine.generate(max_new_tokens=20)["output_ids"]
    engine.update(engine.model_b, "disk")
    from_disk, answer = engine.digest(), engine.generate(max_new_tokens=20)["output_ids"]
    engine.update(engine.model_a, "again")
    assert engine.digest() == before != from_disk
    sender.store(3, weights(engine.model_b).items())
    assert transfer(engine, row(sender, 3)) > 3
    assert engine.digest() == from_disk
    assert engine.label() == "3"
    sampled = engine.generate(max_new_tokens=20)
    assert sampled["output_ids"] == answer != answer_before
    assert sampled["meta_info"]["weight_versions"] == [{"version": "3", "start": 0, "end": 20}]


def test_running_request_goes_on_under_the_broadcast_weights(engine: EngineClient, sender: WeightSender) -> None:
    sender.store(4, weights(engine.model_b).items())
    running = engine.start(max_new_tokens=LONG)
    engine.wait_for(running=1)
    with engine.paused("in_place"):
        transfer(engine, row(sender, 4), flush_cache=False)
    spans = running.result()["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "4"]
    assert 0 < spans[0]["end"] == spans[1]["start"]
    assert spans[1]["end"] == LONG


def test_one_sender_serves_versions_one_after_the_other(engine: EngineClient, sender: WeightSender) -> None:
    checksums = []
    for version, model in ((1, engine.model_b), (2, engine.model_a), (3, engine.model_b)):
        sender.store(version, weights(model).items())
        sender.keep([version])
        transfer(engine, row(sender, version))
        checksums.append(engine.digest())
        assert engine.label() == str(version)
    assert checksums[0] == checksums[2] != checksums[1]
    with pytest.raises(SenderLost, match=r"version 1 is not held any more \(held: 3\)"):
        transfer(engine, row(sender, 1))
    assert engine.label() == "3"


def test_an_update_outside_a_session_is_refused_at_once(engine: EngineClient) -> None:
    body = {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "none", "weight_version": "9"}
    status, answer = engine.call("/update_weights_from_distributed", body, "POST")
    assert (status, answer["success"]) == (400, False)
    assert "must run between begin_weight_update() and end_weight_update()" in answer["message"]
    assert engine.label() == "default"


def test_a_session_that_a_crash_left_open_does_not_stop_the_next_transfer(
    engine: EngineClient, sender: WeightSender
) -> None:
    engine.post("/begin_weight_update")
    assert engine.call("/begin_weight_update", {}, "POST")[0] == 400
    sender.store(5, weights(engine.model_b).items())
    transfer(engine, row(sender, 5))
    assert engine.label() == "5"
    status, answer = engine.call("/end_weight_update", {}, "POST")
    assert status == 400, "the transfer ended its own session"
    assert "no weight-update session is open" in answer["message"]


def test_a_label_given_with_the_first_bucket_lies_about_the_rest(engine: EngineClient, sender: WeightSender) -> None:
    """Why the label travels with the last bucket only: it changes as soon as a bucket brings it."""
    sender.store(6, weights(engine.model_b).items())

    async def first_bucket_alone(with_label: dict[str, str]) -> None:
        client = controller_side(engine.url)
        opened = await Collective("test.", None, TIMEOUT_S).open(client, row(sender, 6))
        await client.begin_update(TIMEOUT_S)
        info = opened.buckets[0]
        body = {"names": info.names, "dtypes": info.dtypes, "shapes": info.shapes, "group_name": opened.name}
        await opened._bucket(0, body | {"load_format": "flattened_bucket", "flush_cache": True} | with_label)
        await client.update_call("/end_weight_update", {}, TIMEOUT_S)
        await opened.close()
        await client.close()

    before = engine.digest()
    asyncio.run(first_bucket_alone({}))
    assert engine.label() == "default"
    assert engine.digest() != before
    asyncio.run(first_bucket_alone({"weight_version": "6"}))
    assert engine.label() == "6"
    engine.update(engine.model_b, "b")
    whole = engine.digest()
    engine.update(engine.model_a, "default")
    asyncio.run(first_bucket_alone({"weight_version": "6"}))
    assert engine.digest() != whole, "half a version under a whole label"


def test_a_refused_bucket_does_not_hold_the_sender(engine: EngineClient, sender: WeightSender) -> None:
    """The engine left its session: it refuses at once, and both sides are free again."""
    sender.store(7, weights(engine.model_b).items())

    async def work() -> None:
        client = controller_side(engine.url)
        opened = await Collective("test.", None, TIMEOUT_S).open(client, row(sender, 7))
        info = opened.buckets[0]
        body = {"names": info.names, "dtypes": info.dtypes, "shapes": info.shapes, "group_name": opened.name}
        with pytest.raises(EngineError, match="must run between begin_weight_update"):
            await opened._bucket(0, body | {"load_format": "flattened_bucket"})
        await opened.close()
        await client.close()

    started_s = time.monotonic()
    asyncio.run(work())
    assert time.monotonic() - started_s < TIMEOUT_S / 2
    transfer(engine, row(sender, 7))
    assert engine.label() == "7"


def test_an_engine_that_never_comes_costs_the_sender_its_deadline_only() -> None:
    sender = WeightSender("127.0.0.1", None, "gloo", BUCKET_BYTES, 0.3)
    try:
        sender.store(1, {"a": torch.zeros(4)}.items())
        sender.join(protocol.JoinGroupRequest("lonely", 2, 1))
        with pytest.raises(Exception, match=r"group lonely was not joined|did not join group lonely"):
            sender.send(protocol.SendBucketRequest("lonely", 0))
    finally:
        sender.close()


def test_a_group_that_nobody_ends_ends_with_its_version() -> None:
    """The controller that opened it was killed."""
    sender = WeightSender("127.0.0.1", None, "gloo", BUCKET_BYTES, 0.3)
    try:
        for version in (1, 2):
            sender.store(version, {"a": torch.zeros(4)}.items())
            sender.join(protocol.JoinGroupRequest(f"of {version}", 2, version))
        sender.keep([2])
        with pytest.raises(PublishError, match="group of 1 is not open"):
            sender.send(protocol.SendBucketRequest("of 1", 0))
        with pytest.raises(PublishError, match=r"group of 2 was not joined|did not join group of 2"):
            sender.send(protocol.SendBucketRequest("of 2", 0))
    finally:
        sender.close()


def test_the_sender_wants_its_token(engine: EngineClient) -> None:
    sender = WeightSender("127.0.0.1", "secret", "gloo", BUCKET_BYTES, TIMEOUT_S)
    try:
        sender.store(1, weights(engine.model_b).items())
        with pytest.raises(SenderRefused, match="wrong or missing bearer token"):
            transfer(engine, row(sender, 1))
        transfer(engine, row(sender, 1), token="secret")
        assert engine.label() == "1"
    finally:
        sender.close()


def test_a_sender_that_is_gone_is_not_the_engines_fault(engine: EngineClient) -> None:
    sender = WeightSender("127.0.0.1", None, "gloo", BUCKET_BYTES, TIMEOUT_S)
    version = row(sender, 1)
    sender.close()
    with pytest.raises(SenderLost, match="did not answer /join"):
        transfer(engine, version)
    assert engine.generate(PROMPT, max_new_tokens=1)["meta_info"]["weight_version"] == "default"
