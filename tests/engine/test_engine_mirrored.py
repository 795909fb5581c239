"""Versions published as changes, by way of a mirror, in an engine. The same suite for a real server."""

import asyncio
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from engine_client import EngineClient
from safetensors.torch import load_file

from asympo_megatron.errors import EngineError
from asympo_megatron.rollout.client import EngineClient as ControllerSide
from asympo_megatron.rollout.mirrored import Mirrored
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.sync import list_versions, read_manifest, version_path, write_version

sys.path.insert(0, str(Path(__file__).parent.parent / "sync"))  # both ends of the transport

from delta_world import DeltaWorld, delta_world

TIMEOUT_S = 30.0
LONG = 400
Weights = dict[str, torch.Tensor]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DeltaWorld]:
    with delta_world(tmp_path, deltas=5, keep_last=9) as made:
        yield made


def nudged(weights: Weights, seed: int) -> Weights:
    """About 1 element in 50 of every tensor has another value, as after a small step in few bits."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in weights.items():
        chosen = torch.rand(tensor.shape, generator=generator) < 0.02
        changed[name] = torch.where(chosen, tensor + 0.3 * torch.randn(tensor.shape, generator=generator), tensor)
    return changed


def transfer(engine: EngineClient, world: DeltaWorld, version: int, flush_cache: bool = True, port: int = 0) -> None:
    """One whole transfer as the controller makes it."""

    async def work() -> None:
        client = ControllerSide(engine.url, None, request_timeout_s=60.0, control_timeout_s=TIMEOUT_S)
        try:
            row = VersionRow(version, version, 1, f"sum{version}", str(version_path(world.root, version)))
            opened = await Mirrored("test.", None, port or world.mirror.port, TIMEOUT_S).open(client, row)
            try:
                await opened.run(str(version), flush_cache=flush_cache)
            finally:
                await opened.close()
        finally:
            await client.close()

    asyncio.run(work())


def plain(engine: EngineClient, folder: Path, weights: Weights) -> dict[str, str]:
    """The engine's checksums after the same weights from a whole version, written by itself."""
    path = write_version(folder, 1, 1, weights.items(), "x", engine.model_a)
    engine.update(path, "plain")
    digest = engine.digest()
    engine.update(engine.model_a, "again")
    return digest


def test_a_chain_of_deltas_gives_the_weights_that_the_trainer_published(
    engine: EngineClient, world: DeltaWorld
) -> None:
    """By checksum of every tensor and by what is sampled, version after version and over several at once."""
    versions = [load_file(engine.model_b / "model.safetensors")]
    for seed in range(4):
        versions.append(nudged(versions[-1], seed))
    wanted = [plain(engine, world.path / f"plain{number}", weights) for number, weights in enumerate(versions)]
    assert all(old != new for old, new in pairwise(wanted))
    sampled = []
    for version, weights in enumerate(versions, 1):
        world.publish(version, weights)
        if version != 3:  # skipped, as an overtaken version is
            transfer(engine, world, version)
            assert (engine.digest(), engine.label()) == (wanted[version - 1], str(version))
            sampled.append(tuple(engine.generate(max_new_tokens=20)["output_ids"]))
    assert len(set(sampled)) == 4
    manifests = [read_manifest(version_path(world.root, version)) for version in range(1, 6)]
    assert [manifest.base for manifest in manifests] == [None, 1, 2, 3, 4]
    whole = manifests[0].files["model.safetensors"].bytes
    assert all(sum(entry.bytes for entry in manifest.files.values()) < whole / 10 for manifest in manifests[1:])
    assert list_versions(world.mirror._folder.path) == [5]


def test_running_request_goes_on_under_the_mirrored_weights(engine: EngineClient, world: DeltaWorld) -> None:
    weights = load_file(engine.model_b / "model.safetensors")
    world.publish(1, weights)
    world.publish(2, nudged(weights, 0))
    running = engine.start(max_new_tokens=LONG)
    engine.wait_for(running=1)
    with engine.paused("in_place"):
        transfer(engine, world, 2, flush_cache=False)
    spans = running.result()["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "2"]
    assert 0 < spans[0]["end"] == spans[1]["start"]
    assert spans[1]["end"] == LONG


def test_a_damaged_delta_leaves_the_engine_as_it_was(engine: EngineClient, world: DeltaWorld) -> None:
    before = engine.digest()
    weights = load_file(engine.model_b / "model.safetensors")
    world.publish(1, weights)
    world.publish(2, nudged(weights, 0))
    file = version_path(world.root, 2) / "model.safetensors.delta"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(EngineError, match=r"was given no weights: .*v000002/model.safetensors.delta has sha256"):
        transfer(engine, world, 2)
    assert (engine.digest(), engine.label()) == (before, "default")
    transfer(engine, world, 1)
    assert engine.label() == "1"


def test_a_delta_without_a_mirror_is_refused_by_the_engine(engine: EngineClient, world: DeltaWorld) -> None:
    """What a controller that knows of no mirror would do: HTTP 400, nothing changed."""
    before = engine.digest()
    weights = load_file(engine.model_b / "model.safetensors")
    world.publish(1, weights)
    path = world.publish(2, nudged(weights, 0))
    body = {"model_path": str(path), "weight_version": "2", "load_format": "auto"}
    status, answer = engine.call("/update_weights_from_disk", body, "POST")
    assert (status, answer["success"]) == (400, False)
    assert (engine.digest(), engine.label()) == (before, "default")


def test_a_missing_mirror_is_named(engine: EngineClient, world: DeltaWorld) -> None:
    world.publish(1, load_file(engine.model_b / "model.safetensors"))
    with pytest.raises(EngineError, match=r"has no mirror at 127.0.0.1:9, .*Run `asympo mirror` there"):
        transfer(engine, world, 1, port=9)
