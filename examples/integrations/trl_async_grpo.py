"""TRL's AsyncGRPOTrainer with ASymPO: python examples/integrations/trl_async_grpo.py MODEL PROMPTS.jsonl

PROMPTS.jsonl is that of trl_grpo.py. A vLLM server answers at http://localhost:8000.
"""

import sys

from datasets import load_dataset
from trl.experimental.async_grpo import AsyncGRPOConfig

from asympo_megatron.integrations.trl_async import AsympoAsyncGRPOTrainer as AsyncGRPOTrainer


def exact(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 where the response is the answer."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


if __name__ == "__main__":
    model, prompts = sys.argv[1:]
    AsyncGRPOTrainer(
        model=model,
        reward_funcs=exact,
        train_dataset=load_dataset("json", data_files=prompts, split="train"),
        args=AsyncGRPOConfig(num_generations=8, per_device_train_batch_size=8, token_budget=0),
    ).train()
