"""A run that evaluates steps 0, 2, 4 and 5 on three held-out prompts."""

from rollout_world import World, small_config

from asympo_megatron import protocol
from asympo_megatron.config import Config


def eval_config(**more: object) -> Config:
    return small_config(rollout__eval__interval_steps=2, rollout__eval__prompts=3, run__steps=5, **more)


def held_out(body: dict) -> bool:
    return body["input_ids"][1] == 9


async def to_the_end(w: World, first: int = 0) -> dict[int, list[protocol.Evaluation]]:
    """Train to the last step; evaluations by the step whose lease (or finish) carried them."""
    carried: dict[int, list[protocol.Evaluation]] = {}
    for step in range(first, w.config.run.steps):
        reply = await w.trainer.lease(step)
        assert reply.ready
        carried[step] = reply.evaluations
        await w.trainer.publish(step + 1)
    reply = await w.trainer.finish(w.config.run.steps)
    assert reply.done
    carried[w.config.run.steps] = reply.evaluations
    return carried
