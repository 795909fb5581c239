"""The controller brings versions published as changes to embedded engines of one host; a mirror dies and comes back."""

import sys
from pathlib import Path

import torch
from rollout_world import World, run_async, small_config, world
from safetensors.torch import load_file
from test_collective_sync import make_task
from test_embedded_engine import AnyEngine

from asympo_megatron import protocol
from asympo_megatron.engine import EngineOptions
from asympo_megatron.rollout.fleet import EngineState
from asympo_megatron.sync import read_manifest
from asympo_megatron.testing.engine_server import engine_server
from asympo_megatron.testing.tiny_model import make_tiny_model

sys.path.insert(0, str(Path(__file__).parent.parent / "sync"))  # both ends of the transport

from delta_world import Weights, edited, make_mirror, make_transport


def test_engines_take_deltas_and_come_back_with_their_mirror(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    weights = load_file(make_tiny_model(tmp_path / "model") / "model.safetensors")
    name = next(iter(weights))
    mirrors = [make_mirror(tmp_path)]
    config = small_config(sync__deltas=4, sync__mirror_port=mirrors[0].port)
    transport = make_transport(tmp_path, 4)

    async def publish(w: World, step: int) -> Path:
        """As the trainer does it."""
        asked = protocol.VersionRequest(w.trainer.incarnation, step, f"weights-{step}")
        version = (await w.trainer.call("/version", asked, protocol.VersionReply)).version
        new: Weights = edited(weights, **{name: {step: float(step)}})
        path = transport.store(version, step, new.items(), f"weights-{step}")
        request = protocol.PublishRequest(w.trainer.incarnation, step, version, f"weights-{step}", path)
        transport.keep((await w.trainer.call("/publish", request, protocol.PublishReply)).in_use)
        return Path(path)

    async def scenario(urls: list[str]) -> None:
        engines = [AnyEngine(url) for url in urls]
        async with world(tmp_path / "run", config, engines, task=make_task(), verify=None) as w:  # type: ignore[arg-type]
            fleet = w.controller.parts.fleet.engines
            await w.trainer.attach()
            bases = []
            for step in range(3):
                bases.append(read_manifest(await publish(w, step)).base)
                assert (await w.trainer.lease(step)).ready
                await w.until(
                    lambda step=step: all(e.serving and e.weights and e.weights.step == step for e in fleet.values())
                )
            assert bases == [None, 0, 1]
            assert not any(engine.quarantines for engine in fleet.values())

            mirrors[0].close()
            await publish(w, 3)
            await w.until(lambda: all(engine.state is EngineState.EVICTED for engine in fleet.values()))
            assert all("has no mirror at 127.0.0.1" in engine.last_error for engine in fleet.values())
            mirrors.append(make_mirror(tmp_path, port=config.sync.mirror_port))
            for url in urls:
                w.controller.join_engine(url)
            fleet = w.controller.parts.fleet.engines
            await w.until(lambda: all(e.serving and e.weights and e.weights.step == 3 for e in fleet.values()))

    first = EngineOptions(str(tmp_path / "model"), load_format="dummy", threads=1)
    try:
        with engine_server(first) as one, engine_server(first) as two:
            run_async(scenario([one, two]))
    finally:
        transport.close()
        mirrors[-1].close()


def test_a_run_that_goes_on_without_deltas_asks_for_a_whole_version(tmp_path: Path) -> None:
    """Engines could not load the newest version of the journal: they wait for the trainer's."""
    mirror, transport = make_mirror(tmp_path), make_transport(tmp_path, 4)

    async def resume(deltas: int, step: int, publish: bool) -> bool:
        """Ask for a version of the weights of ``step``; returns whether they are needed."""
        config = small_config(sync__deltas=deltas, sync__mirror_port=mirror.port)
        async with world(tmp_path / "run", config, verify=None) as w:
            name = f"weights-{step}"
            await w.trainer.attach()
            request = protocol.VersionRequest(w.trainer.incarnation, step, name)
            reply = await w.trainer.call("/version", request, protocol.VersionReply)
            if publish:
                path = transport.store(reply.version, step, [("x", torch.full((50,), float(step)))], name)
                request = protocol.PublishRequest(w.trainer.incarnation, step, reply.version, name, path)
                await w.trainer.call("/publish", request, protocol.PublishReply)
            return reply.needed

    try:
        assert run_async(resume(deltas=4, step=0, publish=True))
        assert not run_async(resume(deltas=0, step=0, publish=False)), "a whole version is loaded without a mirror"
        assert run_async(resume(deltas=4, step=1, publish=True))
        assert read_manifest(tmp_path / "weights" / "v000001").base == 0
        assert not run_async(resume(deltas=4, step=1, publish=False))
        assert run_async(resume(deltas=0, step=1, publish=False))
    finally:
        transport.close()
        mirror.close()
