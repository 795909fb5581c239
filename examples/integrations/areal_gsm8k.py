"""AReaL 1.0 with ASymPO: AReaL's GSM8K script with two names changed.

python examples/integrations/areal_gsm8k.py --config YOURS.yaml, after adding the keys of areal_gsm8k.yaml to your own
configuration file (engines, model and cluster are AReaL's).
"""

import sys

from areal.api.cli_args import load_expr_config
from areal.dataset import get_custom_dataset
from areal.utils.hf_utils import load_hf_tokenizer

from asympo_megatron.integrations.areal import AsympoGRPOConfig, AsympoPPOTrainer

if __name__ == "__main__":
    config, _ = load_expr_config(sys.argv[1:], AsympoGRPOConfig)
    tokenizer = load_hf_tokenizer(config.tokenizer_path)
    prompts = get_custom_dataset(split="train", dataset_config=config.train_dataset, tokenizer=tokenizer)
    with AsympoPPOTrainer(config, train_dataset=prompts) as trainer:
        trainer.train(
            workflow="areal.workflow.rlvr.RLVRWorkflow",
            workflow_kwargs={
                "reward_fn": "areal.reward.gsm8k.gsm8k_reward_fn",
                "gconfig": config.gconfig,
                "tokenizer": config.tokenizer_path,
                "enable_thinking": False,
            },
        )
