"""One random batch in the layouts that frameworks hand over, the core's gradient for it, and the comparison.

The policy is a free logit per response position and vocabulary entry, so the gradient is compared token by token:
nothing averages out. Axis suffixes: P response positions of all rows one after the other, V vocabulary, R responses,
L padded response positions, S positions of packed full sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from asympo_megatron.advantages import compute_advantages
from asympo_megatron.batch import UNTRAINED, ResponseBatch
from asympo_megatron.objectives import Objective
from asympo_megatron.parallel import ParallelGroups

TOLERANCE = 1e-6
"""Relative to the largest entry of each response's gradient, in float32."""

CASES = {"asympo": {"nll_floor": 0.5}, "spo": {"negative_scale": 0.25}}
"""Objectives that every adapter is compared with, and options that this batch makes matter."""

GROUP_SIZE = 4
_RESPONSE_LENGTHS = (9, 1, 6, 3, 5, 12, 1, 4, 2, 7, 3, 8)
_PROMPT_LENGTHS = (3, 3, 3, 3, 1, 1, 1, 1, 6, 6, 6, 6)
_REWARDS = (1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.25, 0.0, 0.0)  # the second group has no variance
_MASKED_ROW = 3
_CONFIDENT_ROW = 9  # below the floor of CASES
_TOOL_TOKENS = ((0, 2), (0, 3), (5, 0), (11, 7))  # untrained (row, position): inside, first and last


@dataclass(frozen=True)
class ParityBatch:
    """Twelve responses to three prompts.

    Args:
        logits_PV: float32, the policy.
        token_P: int64, the sampled tokens.
        mask_P: bool, False where a token carries no loss.
        response_length_R: positions of each response, masked ones included.
        prompt_length_R: tokens of the prompt before it.
        reward_R, advantage_R: float32; advantages of the complete groups.
    """

    logits_PV: Tensor
    token_P: Tensor
    mask_P: Tensor
    response_length_R: Tensor
    prompt_length_R: Tensor
    reward_R: Tensor
    advantage_R: Tensor

    @property
    def num_responses(self) -> int:
        return self.advantage_R.shape[0]

    @cached_property
    def row_P(self) -> Tensor:
        """Row of each response position."""
        return torch.repeat_interleave(torch.arange(self.num_responses), self.response_length_R)

    @cached_property
    def column_P(self) -> Tensor:
        """Position inside its response."""
        start_R = self.response_length_R.cumsum(0) - self.response_length_R
        return torch.arange(self.row_P.shape[0]) - start_R[self.row_P]

    @property
    def response_ids_P(self) -> Tensor:
        """As ``ResponseBatch`` wants them."""
        return torch.where(self.mask_P, self.row_P, UNTRAINED)

    @property
    def token_count_R(self) -> Tensor:
        """Trained tokens of each response."""
        return torch.zeros_like(self.response_length_R).index_add_(0, self.row_P, self.mask_P.long())

    def leaf(self) -> Tensor:
        """A fresh [P, V] copy of the policy, to differentiate."""
        return self.logits_PV.clone().requires_grad_()

    def logprob(self, logits_PV: Tensor) -> Tensor:
        """log pi of the sampled tokens, [P]."""
        return torch.log_softmax(logits_PV, -1).gather(-1, self.token_P[:, None]).squeeze(-1)

    def pad(self, value_P: Tensor, fill: float = 0.0) -> Tensor:
        """[P] to right-padded [R, L], differentiably."""
        shape = (self.num_responses, int(self.response_length_R.max()))
        return value_P.new_full(shape, fill).index_put((self.row_P, self.column_P), value_P)

    @property
    def mask_RL(self) -> Tensor:
        """Trained tokens in the padded layout, bool."""
        return self.pad(self.mask_P, False)

    def rows(self, rows: Sequence[int]) -> tuple["ParityBatch", Tensor]:
        """A micro-batch of some rows in the given order, and the index in P of each of its positions."""
        index = torch.cat([torch.nonzero(self.row_P == row).flatten() for row in rows])
        select = torch.tensor(rows)
        part = ParityBatch(
            self.logits_PV[index],
            self.token_P[index],
            self.mask_P[index],
            *(value[select] for value in (self.response_length_R, self.prompt_length_R, self.reward_R)),
            self.advantage_R[select],
        )
        return part, index

    @property
    def sequence_length_R(self) -> Tensor:
        """Prompt and response together."""
        return self.prompt_length_R + self.response_length_R

    @property
    def scoring_index_P(self) -> Tensor:
        """Position in S, the full sequences one after the other, whose logits score each response token."""
        end_R = self.sequence_length_R.cumsum(0)
        return (end_R - self.response_length_R)[self.row_P] + self.column_P - 1

    def sequence_logits(self, logits_PV: Tensor) -> Tensor:
        """[S, V] of full packed sequences; positions that score no response token hold other numbers."""
        total = int(self.sequence_length_R.sum())
        filler_SV = torch.linspace(-1, 1, total)[:, None] * torch.ones(logits_PV.shape[1])
        return filler_SV.index_put((self.scoring_index_P,), logits_PV)

    @property
    def sequence_tokens(self) -> Tensor:
        """[S] token ids of full packed sequences; prompt tokens are 0."""
        token_S = torch.zeros(int(self.sequence_length_R.sum()), dtype=torch.int64)
        return token_S.index_put((self.scoring_index_P + 1,), self.token_P)


def make_batch(seed: int = 0, vocab: int = 11) -> ParityBatch:
    """Unequal lengths, tokens masked inside, a masked response, one-token responses, a group without variance."""
    generator = torch.Generator().manual_seed(seed)
    length_R = torch.tensor(_RESPONSE_LENGTHS)
    total = int(length_R.sum())
    row_P = torch.repeat_interleave(torch.arange(len(length_R)), length_R)
    token_P = torch.randint(vocab, (total,), generator=generator)
    logits_PV = 2 * torch.randn(total, vocab, generator=generator)
    logits_PV[row_P == _CONFIDENT_ROW, token_P[row_P == _CONFIDENT_ROW]] = 6.0
    mask_P = row_P != _MASKED_ROW
    start_R = length_R.cumsum(0) - length_R
    for row, position in _TOOL_TOKENS:
        mask_P[start_R[row] + position] = False
    groups = [_REWARDS[start : start + GROUP_SIZE] for start in range(0, len(_REWARDS), GROUP_SIZE)]
    advantages = [value for group in groups for value in compute_advantages(group, "group_mean")]
    prompts = torch.tensor(_PROMPT_LENGTHS)
    return ParityBatch(logits_PV, token_P, mask_P, length_R, prompts, torch.tensor(_REWARDS), torch.tensor(advantages))


def core_batch(batch: ParityBatch) -> ResponseBatch:
    """The batch as the core reads it: all response positions, packed."""
    return ResponseBatch(batch.response_ids_P, batch.advantage_R, batch.token_count_R)


def core_gradient(objective: Objective, batch: ParityBatch) -> tuple[float, Tensor]:
    """Loss and gradient [P, V] of the core: the summed loss divided by N once."""
    leaf_PV = batch.leaf()
    out = objective(-batch.logprob(leaf_PV), core_batch(batch), ParallelGroups.single())
    loss = out.loss_sum / out.normalizer_count
    return loss.item(), torch.autograd.grad(loss, leaf_PV)[0]


def assert_same_gradient(got_PV: Tensor, want_PV: Tensor, batch: ParityBatch, tolerance: float = TOLERANCE) -> None:
    """Every response's gradient agrees to ``tolerance`` of its own largest entry; where it is 0, it is exactly 0."""
    assert got_PV.shape == want_PV.shape
    assert got_PV.isfinite().all()
    errors = {}
    for row in range(batch.num_responses):
        got, want = got_PV[batch.row_P == row].double(), want_PV[batch.row_P == row].double()
        error = float((got - want).abs().max())
        if error > tolerance * float(want.abs().max()):
            errors[row] = error / max(float(want.abs().max()), 1e-30)
    assert errors == {}, f"relative error of the gradient by response: {errors}"
