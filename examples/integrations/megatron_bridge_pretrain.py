"""Megatron-Bridge's training loop with ASymPO. The data set yields the keys of megatron_lm.split_batch."""

from megatron.bridge.training.pretrain import pretrain

from asympo_megatron import build_objective
from asympo_megatron.integrations.megatron_bridge import ForwardStep


def train(config):
    config.model.calculate_per_token_loss = True
    config.ddp.average_in_collective = False
    pretrain(config, forward_step_func=ForwardStep(build_objective("asympo", nll_floor=1e-3)))
