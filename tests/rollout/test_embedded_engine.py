"""The controller on the embedded engine, with weights through the disk transport: nothing faked but the task."""

from pathlib import Path

import torch
from rollout_world import FakeCodec, FakeTask, run_async, small_config, world
from safetensors.torch import load_file

from asympo_megatron import protocol
from asympo_megatron.engine import EngineOptions
from asympo_megatron.sync import write_version
from asympo_megatron.testing.engine_server import engine_server
from asympo_megatron.testing.tiny_model import EOS_ID, VOCAB_SIZE, make_tiny_model


class AnyEngine:
    """An engine that is already served; has the face of a fake one for ``world``."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def start(self) -> str:
        return self.url

    async def kill(self) -> None:
        """The block that serves it ends it."""


def test_four_steps_with_new_weights_each(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = make_tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    task = FakeTask()
    task.codec = FakeCodec([EOS_ID], VOCAB_SIZE)
    config = small_config(run__steps=4, rollout__max_lag_steps=2, rollout__sampling__max_new_tokens=24)
    config.rollout.eval.interval_steps, config.rollout.eval.prompts = 4, 3

    async def publish(w, step: int) -> None:  # type: ignore[no-untyped-def]
        ask = protocol.VersionRequest(w.trainer.incarnation, step, f"weights-{step}")
        version = (await w.trainer.call("/version", ask, protocol.VersionReply)).version
        tensors = [(name, tensor * (1 + step / 100)) for name, tensor in weights.items()]
        path = write_version(tmp_path / "weights", version, step, tensors, f"weights-{step}", model)
        request = protocol.PublishRequest(w.trainer.incarnation, step, version, f"weights-{step}", str(path))
        await w.trainer.call("/publish", request, protocol.PublishReply)

    async def scenario(url: str) -> None:
        async with world(tmp_path / "run", config, [AnyEngine(url)], task=task, verify=None) as w:  # type: ignore[list-item]
            await w.trainer.attach()
            await publish(w, 0)
            evaluations, versions = [], set()
            for step in range(4):
                reply = await w.trainer.lease(step)
                assert reply.ready
                evaluations += reply.evaluations
                assert max(row.lag for row in reply.responses) <= 2
                for sample in await w.trainer.payload(reply):
                    assert 1 <= len(sample.ids) <= 24
                    assert len(sample.ids) == 24 or sample.ids[-1] == EOS_ID
                    assert sample.versions[0].start == 0
                    assert sample.versions[-1].end == len(sample.ids)
                    versions |= {span.version for span in sample.versions}
                await publish(w, step + 1)
            evaluations += (await w.trainer.finish(4)).evaluations
            assert [(result.step, result.responses) for result in evaluations] == [(0, 3), (4, 3)]
            assert versions <= {0, 1, 2, 3}
            assert w.controller.parts.fleet.engines[url].last_error == ""

    with engine_server(EngineOptions(model_path=str(model), port=0, load_format="dummy")) as url:
        run_async(scenario(url))
