"""Weights in memory that an engine maps by name, or in the message itself. The same suite for a real server."""

import asyncio
import base64
import os
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_client import PROMPT, EngineClient
from safetensors.torch import load_file

from asympo_megatron import protocol
from asympo_megatron.errors import EngineError, PublishError
from asympo_megatron.rollout.client import EngineClient as ControllerSide
from asympo_megatron.rollout.collective import SenderLost, SenderRefused
from asympo_megatron.rollout.colocated import Colocated, SharedTransfer
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.sync.sharer import WeightSharer

TIMEOUT_S = 30.0
BUCKET_BYTES = 100_000
LONG = 400


@pytest.fixture
def sharer() -> Iterator[WeightSharer]:
    sharer = WeightSharer(None, BUCKET_BYTES)
    yield sharer
    sharer.close()


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def transfer(
    engine: EngineClient,
    sharer: WeightSharer,
    version: int,
    flush_cache: bool = True,
    token: str | None = None,
    kind: type[SharedTransfer] = SharedTransfer,
) -> int:
    """One whole transfer as the controller makes it; returns the number of buckets."""

    async def work() -> int:
        client = ControllerSide(engine.url, None, request_timeout_s=60.0, control_timeout_s=TIMEOUT_S)
        try:
            row = VersionRow(version, version, 1, f"weights-{version}", sharer.address)
            opened = await Colocated("test.", token, TIMEOUT_S).open(client, row)
            opened = kind(**vars(opened))
            try:
                await opened.run(str(version), flush_cache=flush_cache)
            finally:
                await opened.close()
            return opened.buckets
        finally:
            await client.close()

    return asyncio.run(work())


def test_shared_weights_equal_those_from_disk(engine: EngineClient, sharer: WeightSharer) -> None:
    """By checksum of every tensor and by what is sampled."""
    before, answer_before = engine.digest(), engine.generate(max_new_tokens=20)["output_ids"]
    engine.update(engine.model_b, "disk")
    from_disk, answer = engine.digest(), engine.generate(max_new_tokens=20)["output_ids"]
    engine.update(engine.model_a, "again")
    assert engine.digest() == before != from_disk
    sharer.store(3, weights(engine.model_b).items())
    assert transfer(engine, sharer, 3) > 3
    assert engine.digest() == from_disk
    assert engine.label() == "3"
    sampled = engine.generate(max_new_tokens=20)
    assert sampled["output_ids"] == answer != answer_before
    assert sampled["meta_info"]["weight_versions"] == [{"version": "3", "start": 0, "end": 20}]


class LeavesOneOut(SharedTransfer):
    """A transfer that does not hand over the second bucket."""

    async def _share(self, number: int) -> list[str]:
        return await super()._share(0 if number == 1 else number)


class Stale(SharedTransfer):
    """A transfer that lets memory of an earlier bucket stand for the second one."""

    async def _share(self, number: int) -> list[str]:
        messages = await super()._share(number)
        if number == 1:
            await super()._share(0)
        return messages


@pytest.mark.parametrize("mutant", [LeavesOneOut, Stale])
def test_the_checksum_notices_a_bucket_that_was_left_out(
    engine: EngineClient, sharer: WeightSharer, mutant: type[SharedTransfer]
) -> None:
    """The label does not: it comes with the last bucket, whatever was in the others."""
    engine.update(engine.model_b, "disk")
    from_disk = engine.digest()
    engine.update(engine.model_a, "again")
    sharer.store(3, weights(engine.model_b).items())
    transfer(engine, sharer, 3, kind=mutant)
    assert engine.label() == "3"
    assert engine.digest() != from_disk
    transfer(engine, sharer, 3)
    assert engine.digest() == from_disk


def test_running_request_goes_on_under_the_shared_weights(engine: EngineClient, sharer: WeightSharer) -> None:
    sharer.store(4, weights(engine.model_b).items())
    running = engine.start(max_new_tokens=LONG)
    engine.wait_for(running=1)
    with engine.paused("in_place"):
        transfer(engine, sharer, 4, flush_cache=False)
    spans = running.result()["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "4"]
    assert 0 < spans[0]["end"] == spans[1]["start"]
    assert spans[1]["end"] == LONG


def test_one_sharer_serves_versions_one_after_the_other_from_the_same_memory(
    engine: EngineClient, sharer: WeightSharer
) -> None:
    shared, mine = Path("/dev/shm"), f"torch_{os.getpid()}_*"
    before = set(shared.glob(mine))
    checksums, held = [], []
    for version, model in ((1, engine.model_b), (2, engine.model_a), (3, engine.model_b)):
        sharer.store(version, weights(model).items())
        sharer.keep([version])
        transfer(engine, sharer, version)
        checksums.append(engine.digest())
        held.append(set(shared.glob(mine)) - before)
        assert engine.label() == str(version)
    assert checksums[0] == checksums[2] != checksums[1]
    assert len(held[0]) == 1
    assert held[0] == held[1] == held[2]
    with pytest.raises(SenderLost, match=r"version 1 is not held any more \(held: 3\)"):
        transfer(engine, sharer, 1)
    sharer.close()
    assert not held[0] & set(shared.glob(mine)), "every process has given its reference up"


def test_tensors_outside_a_session_are_refused_at_once(engine: EngineClient) -> None:
    message = base64.b64encode(pickle.dumps([("x", torch.zeros(1))])).decode()
    status, answer = engine.call("/update_weights_from_tensor", {"serialized_named_tensors": [message]}, "POST")
    assert (status, answer["success"]) == (400, False)
    assert "must run between begin_weight_update() and end_weight_update()" in answer["message"]
    assert engine.label() == "default"


def test_tensors_may_travel_in_the_message(engine: EngineClient) -> None:
    """As other trainers send small ones: a pickled list of names and tensors."""
    engine.update(engine.model_b, "disk")
    from_disk = engine.digest()
    engine.update(engine.model_a, "again")
    message = base64.b64encode(pickle.dumps(list(weights(engine.model_b).items()))).decode()
    engine.post("/begin_weight_update")
    body = {"serialized_named_tensors": [message], "weight_version": "9"}
    assert engine.post("/update_weights_from_tensor", body)["success"]
    engine.post("/end_weight_update")
    assert (engine.digest(), engine.label()) == (from_disk, "9")


def test_a_transfer_that_nobody_ends_ends_with_its_version(sharer: WeightSharer) -> None:
    """The controller that began it was killed: its memory is used again, its file is given back."""
    for version in (1, 2):
        sharer.store(version, {"a": torch.full((4,), float(version))}.items())
    spool = weakref.ref(sharer._versions.spool(1))
    sharer.open(protocol.OpenChannelRequest("lost", 1))
    sharer.open(protocol.OpenChannelRequest("under way", 2))
    first = sharer.share(protocol.ShareBucketRequest("lost", 0, 1)).messages
    sharer.keep([2])
    with pytest.raises(PublishError, match="channel lost is not open"):
        sharer.share(protocol.ShareBucketRequest("lost", 0, 1))
    assert sharer.share(protocol.ShareBucketRequest("under way", 0, 1)).messages != first
    assert spool() is None
    sharer.open(protocol.OpenChannelRequest("next", 2))
    assert sharer._unused == []


def test_the_sharer_wants_its_token(engine: EngineClient) -> None:
    sharer = WeightSharer("secret", BUCKET_BYTES)
    try:
        sharer.store(1, weights(engine.model_b).items())
        with pytest.raises(SenderRefused, match="wrong or missing bearer token"):
            transfer(engine, sharer, 1)
        transfer(engine, sharer, 1, token="secret")
        assert engine.label() == "1"
    finally:
        sharer.close()


def test_memory_that_cannot_be_given_is_not_waited_for(engine: EngineClient, sharer: WeightSharer) -> None:
    sharer.store(1, weights(engine.model_b).items())

    class Unopened(SharedTransfer):
        async def _share(self, number: int) -> list[str]:
            await self.close()
            return await super()._share(number)

    with pytest.raises(EngineError, match=r"was given no weights: .*channel test\.1\.\w+ is not open"):
        transfer(engine, sharer, 1, kind=Unopened)
    engine.post("/end_weight_update")
    assert engine.generate(PROMPT, max_new_tokens=1)["meta_info"]["weight_version"] == "default"
