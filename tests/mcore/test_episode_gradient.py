"""The gradient of responses of several turns: autograd through a plain model, with the replies' tokens left out."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from rank_programs import HF, build

from asympo_megatron.config.rollout_schema import SamplingConfig
from asympo_megatron.mcore import Row
from asympo_megatron.records import VersionSpan
from asympo_megatron.rollout.answer import SamplingParams
from asympo_megatron.rollout.episodes import Player
from asympo_megatron.rollout.grading import grade, raw_group
from asympo_megatron.rollout.requester import Draft, Sampled
from asympo_megatron.testing.gradients import GradientProbe, relative_error

pytestmark = pytest.mark.usefixtures("one_rank")

PROMPT = [3, 5, 8]
TURNS = ([[11, 12, 13], [14], [15, 16]], [[21], [22, 23, 24, 25], [26]], [[31, 32], [33, 34], [35]])


@dataclass(frozen=True)
class Reply:
    turn: str
    text: str
    ids: list[int]


class Scripted:
    """Requester and environment of one response: turns from a list, a reply of three tokens between them."""

    def __init__(self, turns: Sequence[list[int]]) -> None:
        self._turns = list(turns)

    async def sample(self, draft: Draft) -> Sampled:
        ids = self._turns.pop(0)
        return Sampled(ids, [VersionSpan(0, 0, len(ids))], "stop", None, 1)

    async def reply(self, prompt: object, turn: list[int], history: list[tuple[str, str]]) -> Reply | None:
        return Reply("", "", [30 + turn[0], 50, 60]) if self._turns else None


def rows() -> list[Row]:
    """A group of three responses of three turns, as the controller hands it to the trainer."""
    draft = Draft(0, "g", 0, PROMPT, SamplingParams(32, 1.0, 1.0, -1, []))
    episodes = []
    for turns in TURNS:
        script = Scripted(turns)
        episodes.append(asyncio.run(Player(script, script, 8).play(None, draft)))  # type: ignore[arg-type]
    stored = grade(raw_group(0, 0, PROMPT, episodes, [1.0, 0.0, 0.5]), SamplingConfig(), "group_mean")
    return [
        Row(PROMPT, response.ids, response.mask, advantage)
        for response, advantage in zip(stored.group.responses, stored.advantages, strict=True)
    ]


def test_replies_carry_no_gradient_and_are_context() -> None:
    """L = (1/N) sum_i A_i S_i / sg(S_i), S_i over the turns' tokens alone; two mutants miss it by far."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from asympo_megatron.conversion import export_hf

    _, _, learner = build({"config": {"batch": {"max_tokens_per_microbatch": 2048}}})
    model = Qwen3ForCausalLM(Qwen3Config(**HF))
    model.load_state_dict(dict(export_hf(learner)), strict=False)
    played = rows()
    assert [sum(row.mask) for row in played] == [6, 6, 5]
    assert [len(row.ids) for row in played] == [12, 12, 11]
    total = torch.zeros(())
    for row in played:
        ids = torch.tensor([[*row.prompt_ids, *row.ids]])
        nll = -model(ids).logits[0].float().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        summed = sum(nll[len(PROMPT) - 1 + place] for place, bit in enumerate(row.mask) if bit)
        total = total + row.advantage * summed / summed.detach() / len(played)
    total.backward()
    name = "embedding.word_embeddings.weight"
    wanted = model.get_input_embeddings().weight.grad
    assert wanted is not None

    def error(batch: list[Row]) -> float:
        _, _, fresh = build({"config": {"batch": {"max_tokens_per_microbatch": 2048}}})
        probe = GradientProbe(fresh)
        fresh.step([batch], len(batch))
        return relative_error(probe.gradients[name], wanted)

    assert error(played) < 2e-6
    assert error([replace(row, mask=[1] * len(row.ids)) for row in played]) > 0.1, "trained on the replies"
    assert error([_without_replies(row) for row in played]) > 0.1, "trained without the replies as context"


def _without_replies(row: Row) -> Row:
    kept = [token for token, bit in zip(row.ids, row.mask, strict=True) if bit]
    return replace(row, ids=kept, mask=[1] * len(kept))
