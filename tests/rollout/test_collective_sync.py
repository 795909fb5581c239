"""The controller brings weights that lie with a trainer to embedded engines; the trainer goes, an engine hangs."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rollout_world import FakeCodec, FakeTask, World, run_async, small_config, world
from safetensors.torch import load_file
from test_embedded_engine import AnyEngine

from asympo_megatron import protocol
from asympo_megatron.engine import EngineOptions
from asympo_megatron.errors import ControllerError
from asympo_megatron.rollout.fleet import EngineState
from asympo_megatron.sync.sender import WeightSender
from asympo_megatron.sync.sharer import WeightSharer
from asympo_megatron.testing.engine_server import engine_server
from asympo_megatron.testing.tiny_model import EOS_ID, VOCAB_SIZE, make_tiny_model


def make_task() -> FakeTask:
    task = FakeTask()
    task.codec = FakeCodec([EOS_ID], VOCAB_SIZE)
    return task


def broadcasting() -> WeightSender:
    return WeightSender("127.0.0.1", None, "gloo", 50_000, 5.0)


def sharing() -> WeightSharer:
    return WeightSharer(None, 50_000)


async def publish(w: World, sender: WeightSender | WeightSharer, step: int, weights: dict[str, torch.Tensor]) -> bool:
    """As the trainer does it; returns whether the weights were needed."""
    name = f"weights-{step}"
    asked = protocol.VersionRequest(w.trainer.incarnation, step, name)
    version = await w.trainer.call("/version", asked, protocol.VersionReply)
    if version.needed:
        sender.store(version.version, [(key, tensor * (1 + step / 100)) for key, tensor in weights.items()])
        request = protocol.PublishRequest(w.trainer.incarnation, step, version.version, name, sender.address)
        sender.keep((await w.trainer.call("/publish", request, protocol.PublishReply)).in_use)
    return version.needed


@pytest.mark.parametrize(("make", "first_call"), [(broadcasting, "/join"), (sharing, "/open")])
def test_a_lost_sender_is_waited_for_and_blames_no_engine(
    tmp_path: Path, make: Callable[[], WeightSender | WeightSharer], first_call: str
) -> None:
    torch.set_num_threads(1)
    model = make_tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")

    async def scenario(url: str) -> None:
        first = make()
        async with world(tmp_path / "run", small_config(), [AnyEngine(url)], task=make_task()) as w:  # type: ignore[list-item]
            engine = w.controller.parts.fleet.engines[url]
            await w.trainer.attach()
            assert await publish(w, first, 0, weights)
            assert (await w.trainer.lease(0)).ready
            assert not await publish(w, first, 0, weights), "the engines hold them"

            # a version whose sender has gone: the engine waits, is not quarantined, and serves nothing meanwhile
            gone = make()
            gone.close()
            await publish(w, gone, 1, weights)
            await w.until(lambda: engine.weights is None)
            assert engine.state is EngineState.SYNCING
            assert f"did not answer {first_call}" in engine.last_error
            assert engine.quarantines == 0

            # the next trainer publishes the same step again, under a new version
            second = make()
            await w.trainer.attach(1)
            assert await publish(w, second, 1, weights)
            await w.until(lambda: engine.serving and engine.weights is not None and engine.weights.version == 2)
            assert (await w.trainer.lease(1)).ready
            await asyncio.to_thread(second.close)
        await asyncio.to_thread(first.close)

    with engine_server(EngineOptions(str(model), load_format="dummy", threads=1)) as url:
        run_async(scenario(url))


def test_a_hung_engine_delays_no_other(tmp_path: Path) -> None:
    """It accepts connections and never answers, as a stopped process does: the other serves the new version at once."""
    torch.set_num_threads(1)
    model = make_tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    hung = socket.create_server(("127.0.0.1", 0), backlog=64)
    hung_url = f"http://127.0.0.1:{hung.getsockname()[1]}"
    config = small_config(rollout__engine_timeout_s=4.0)

    async def scenario(url: str) -> None:
        sender = WeightSender("127.0.0.1", None, "gloo", 50_000, 4.0)
        async with world(tmp_path / "run", config, [AnyEngine(url), AnyEngine(hung_url)], task=make_task()) as w:  # type: ignore[list-item]
            # both are believed to be ready, so that the hung one hangs in its sync
            engines = w.controller.parts.fleet.engines
            engines[hung_url].client.ready = contextlib.AsyncExitStack().aclose  # type: ignore[method-assign]
            await w.trainer.attach()
            for step in range(3):
                await publish(w, sender, step, weights)
                assert (await w.trainer.lease(step)).ready
                assert engines[url].weights is not None
            assert not engines[hung_url].serving
            assert engines[url].quarantines == 0
        await asyncio.to_thread(sender.close)

    try:
        with engine_server(EngineOptions(str(model), load_format="dummy", threads=1)) as url:
            run_async(scenario(url))
    finally:
        hung.close()


def test_memory_is_not_shared_with_an_engine_elsewhere(tmp_path: Path) -> None:
    """Neither one of the configuration (a test of the configuration holds that) nor one that joins later."""
    config = small_config(sync__transport="colocated")

    async def scenario() -> None:
        async with world(tmp_path / "run", config, [], task=make_task()) as w:
            with pytest.raises(
                ControllerError, match=r"10\.0\.0\.7:30000 is not on a loopback address: .* or collective"
            ):
                w.controller.join_engine("http://10.0.0.7:30000")
            assert not w.controller.parts.fleet.engines

    run_async(scenario())
