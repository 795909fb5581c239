"""A whole run through the protocol, on fake engines."""

from pathlib import Path

from rollout_world import run_async, small_config, world


def test_run_to_the_end(tmp_path: Path) -> None:
    """Every prompt is trained exactly once, in order, at lag 0 with max_lag_steps=0."""

    async def scenario() -> None:
        config = small_config(rollout__max_lag_steps=0)
        async with world(tmp_path, config) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            trained: list[int] = []
            for step in range(config.run.steps):
                reply = await w.trainer.lease(step)
                assert reply.ready
                samples = await w.trainer.payload(reply)
                assert [response.lag for response in reply.responses] == [0] * 4
                for response, sample in zip(reply.responses, samples, strict=True):
                    assert sample.prompt_ids == [response.group_id % 50, 3, 5]
                    assert len(sample.ids) == response.response_tokens == 4
                    assert [span.version for span in sample.versions] == [step]
                trained += [response.group_id for response in reply.responses if response.row == 0]
                await w.trainer.publish(step + 1)
                await w.trainer.commit(step + 1, step + 1)
            assert trained == list(range(12))
            assert w.task.asked == list(range(12))
            assert (await w.trainer.finish(6)).done

    run_async(scenario())
