"""The model, the batch and the bare Megatron loop that Learner.step is compared with."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from asympo_megatron.config import Config
from asympo_megatron.mcore import Learner, Row
from asympo_megatron.mcore.collate import MicroBatch

HF: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "vocab_size": 4096,
}

BUDGET = 2048


def make_config(**sections: dict[str, Any]) -> Config:
    """A run with this model; ``sections`` overrides single values, e.g. parallel={"tensor": 2}."""
    config = Config()
    config.run.steps = 10_000
    config.model.hf = dict(HF)
    config.optimizer.lr = 1e-5
    config.batch.max_tokens_per_microbatch = BUDGET
    for section, values in sections.items():
        for name, value in values.items():
            setattr(getattr(config, section), name, value)
    return config


def make_rows(count: int, longest: int = 160) -> list[Row]:
    """Prompts and responses of uneven lengths, all of them trained on."""
    rng = random.Random(0)
    vocabulary = HF["vocab_size"]
    rows = []
    for _ in range(count):
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(8, longest // 4))]
        ids = [rng.randrange(vocabulary) for _ in range(rng.randint(8, longest - longest // 4))]
        behavior = [-1.0] * len(ids)
        rows.append(Row(prompt, ids, [1] * len(ids), rng.choice((-1.0, 1.0)), behavior))
    return rows


class BareLoop:
    """A training step as a Megatron script writes it, with the learner's model and optimizer.

    Args:
        learner: whose model, gradients buffers and optimizer are used (no interleaved pipeline stages).
        batches: tensors that are ready on the device.
    """

    def __init__(self, learner: Learner, batches: Sequence[MicroBatch]) -> None:
        self._learner, self._batches = learner, batches

    def step(self) -> None:
        """Zero the gradients, run Megatron's schedule, step the optimizer."""
        (chunk,) = self._learner.chunks
        chunk.zero_grad_buffer()
        self._learner.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(self._batches),
            model=chunk,
            num_microbatches=len(self._batches),
            seq_length=BUDGET,
            micro_batch_size=1,
            forward_only=False,
        )
        self._learner.optimizer.step()

    def _forward(self, batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        output = model(batch.tokens, None, None, labels=batch.targets, packed_seq_params=batch.packed)
        return output, lambda output_2T: self._loss(output_2T[0], batch.responses.response_ids_T >= 0)

    def _loss(
        self, token_nll_T: torch.Tensor, trained_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Supervised: the sum over trained tokens, and their number."""
        loss = torch.where(trained_T, token_nll_T, 0.0).sum()
        return loss, trained_T.sum().int(), {"loss": loss.detach()}
