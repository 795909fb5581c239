"""TRL 1.16 with ASymPO: python examples/integrations/trl_grpo.py MODEL PROMPTS.jsonl

Lines of PROMPTS.jsonl hold "prompt" and "answer".
"""

import sys

from datasets import load_dataset
from trl import GRPOConfig

from asympo_megatron.integrations.trl import AsympoGRPOTrainer as GRPOTrainer
from asympo_megatron.objectives import build_objective


def exact(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 where the response is the answer."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


if __name__ == "__main__":
    model, prompts = sys.argv[1:]
    GRPOTrainer(
        model=model,
        objective=build_objective("asympo", nll_floor=1e-3),
        reward_funcs=exact,
        train_dataset=load_dataset("json", data_files=prompts, split="train"),
        args=GRPOConfig(
            num_generations=8,
            scale_rewards="none",
            beta=0.0,
            use_vllm=True,
            vllm_importance_sampling_correction=False,
        ),
    ).train()
