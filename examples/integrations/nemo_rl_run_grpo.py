"""NeMo-RL's examples/run_grpo.py with ASymPO; run it from NeMo-RL's examples folder, with the same arguments and

loss_fn.force_on_policy_ratio=true loss_fn.reference_policy_kl_penalty=0 grpo.seq_logprob_error_threshold=null
"""

import run_grpo

from asympo_megatron.integrations.nemo_rl import ASymPOLoss, with_loss

if __name__ == "__main__":
    run_grpo.setup = with_loss(run_grpo.setup, ASymPOLoss("asympo", nll_floor=1e-3))
    run_grpo.main()
